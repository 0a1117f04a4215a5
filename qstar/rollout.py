"""Sample thoughts: one slot of every block at a time, on the K/V of the text, without gradient."""

from collections.abc import Callable

import torch
from qstar_kernels.vocabulary import LinearHead, sample
from torch import Tensor

from qstar.boundary import BoundaryEmbeddings
from qstar.kv_cache import SlotCache

# (embeddings [B, N * Lq, D], first slot, cache) -> hidden states [B, N * Lq, D] after the final norm
SlotReader = Callable[[Tensor, int, SlotCache], Tensor]


@torch.no_grad()
def rollout(
    read_slots: SlotReader,
    embed: Callable[[Tensor], Tensor],
    boundary: BoundaryEmbeddings,
    head: LinearHead,
    blocks: tuple[int, int],
    thought_length: int,
    cache: SlotCache,
    temperature: float = 1.0,
    suppress: Tensor | None = None,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
) -> Tensor:
    """Sample c_1 .. c_k of every block.

    blocks = (B, N); cache receives the K/V of `<start>` and c_1 .. c_{k-1} (c_k is sampled, not yet read);
    suppress [S] int64: ids that never occur inside a thought; temperature 0 is argmax; uniform [k, B, N] fp64
    in [0, 1): draw by these numbers instead of the generator's. Returns [B, N, k] int64.
    """
    B, N = blocks
    tokens = torch.empty(B, N, thought_length, dtype=torch.long, device=head.weight.device)
    embedding = boundary.start.expand(B, N, -1)
    for i in range(thought_length):
        hidden = read_slots(embedding, i, cache)
        c = sample(
            hidden.flatten(0, 1),
            head,
            temperature=temperature,
            suppress=suppress,
            generator=generator,
            uniform=None if uniform is None else uniform[i].flatten(),
        )
        tokens[:, :, i] = c.view(B, N)
        embedding = embed(tokens[:, :, i])
    return tokens
