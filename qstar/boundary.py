"""Hold `<start>` and `<end>` of a thought: two learned embeddings outside the vocabulary."""

import torch
from torch import Tensor, nn

# tried in this order if the configured text is among them and not one token
SUBSTITUTES = ("—", " —", "---", "--", "-", "...", "\n")


class BoundaryEmbeddings(nn.Module):
    """Embed `<start>` and `<end>`, fed as inputs_embeds: no prompt can contain them, no head emit them.

    Each is `scale` times its parameter: with Adam, it learns `scale` times as fast.
    """

    def __init__(self, width: int, scale: float, device: torch.device | None = None):
        super().__init__()
        self.scale = scale
        self.start_raw = nn.Parameter(torch.zeros(width, dtype=torch.float32, device=device))
        self.end_raw = nn.Parameter(torch.zeros(width, dtype=torch.float32, device=device))

    @property
    def start(self) -> Tensor:
        """Return the embedding that the model reads, [D] fp32."""
        return self.start_raw * self.scale

    @property
    def end(self) -> Tensor:
        """Return the embedding that the model reads, [D] fp32."""
        return self.end_raw * self.scale

    @torch.no_grad()
    def begin_from(self, start: Tensor, end: Tensor) -> None:
        """Set both to the given embeddings, [D]."""
        self.start_raw.copy_(start.float() / self.scale)
        self.end_raw.copy_(end.float() / self.scale)


def boundary_token_id(tokenizer, name: str, text: str) -> tuple[int | None, str]:
    """Find the token that a boundary begins from: (its id, its text), or (None, a description).

    A dash that is not one token (some tokenizers spell it in three bytes) is replaced by another dash or, if
    there is none, by the mean embedding (None). Raises ValueError, naming the option, for any other text that
    is not one token.
    """
    dash = text in SUBSTITUTES
    for candidate in (text, *SUBSTITUTES) if tokenizer is not None else ():
        ids = tokenizer.encode(candidate, add_special_tokens=False)
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            return ids[0], candidate
        if not dash:
            raise ValueError(f"{name} = {text!r}: must be one token of this model, but is {len(ids)}")
    if not dash:
        raise ValueError(f"{name} = {text!r}: must be a dash without a tokenizer")
    return None, "the mean of all token embeddings"
