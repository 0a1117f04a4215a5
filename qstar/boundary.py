"""The `<start>` and `<end>` of a thought: two learned embeddings outside the vocabulary."""

import torch
from torch import Tensor, nn

# tried in this order when the configured text is one of them, but no single token
SUBSTITUTES = ("—", " —", "---", "--", "-", "...", "\n")


class BoundaryEmbeddings(nn.Module):
    """Fed as inputs_embeds, so no prompt can contain them and no head can emit them.

    Each is `scale` times its parameter: with Adam, that makes its learning rate `scale` times the
    parameter's.
    """

    def __init__(self, width: int, scale: float, device: torch.device | None = None):
        super().__init__()
        self.scale = scale
        self.start_raw = nn.Parameter(torch.zeros(width, dtype=torch.float32, device=device))
        self.end_raw = nn.Parameter(torch.zeros(width, dtype=torch.float32, device=device))

    @property
    def start(self) -> Tensor:
        """[D] fp32, the embedding that the model sees."""
        return self.start_raw * self.scale

    @property
    def end(self) -> Tensor:
        return self.end_raw * self.scale

    @torch.no_grad()
    def begin_from(self, start: Tensor, end: Tensor) -> None:
        """Set them to embeddings [D]."""
        self.start_raw.copy_(start.float() / self.scale)
        self.end_raw.copy_(end.float() / self.scale)


def boundary_token_id(tokenizer, name: str, text: str) -> tuple[int | None, str]:
    """The token that a boundary begins from: (its id, its text), or (None, what instead) when no dash is one
    token.

    A byte-level tokenizer spells an em dash it does not know in three tokens, which mean nothing alone.
    Another dash, or the mean, takes the place of a dash only: raises ValueError, naming the option, for any
    other text that is not one token.
    """
    dash = text in SUBSTITUTES
    for candidate in (text, *SUBSTITUTES) if tokenizer is not None else ():
        ids = tokenizer.encode(candidate, add_special_tokens=False)
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            return ids[0], candidate
        if not dash:
            raise ValueError(f"{name} = {text!r}: must be one token of this model, it is {len(ids)}")
    if not dash:
        raise ValueError(f"{name} = {text!r}: finding its token needs the tokenizer")
    return None, "the mean of all token embeddings"
