"""Drawing a token for each row."""

from __future__ import annotations

import torch
from torch import Tensor

from qstar_kernels.vocabulary.head import (
    LinearHead,
    at_temperature,
    check_hidden,
    check_suppress,
    chunks,
    without_autocast,
)

_GROUP = 128


@torch.no_grad()
@without_autocast
def sample(
    hidden: Tensor,
    head: LinearHead,
    temperature: float = 1.0,
    suppress: Tensor | None = None,
    generator: torch.Generator | None = None,
    rows: int | None = None,
    uniform: Tensor | None = None,
) -> Tensor:
    """Draw a token for each row from softmax(logits / temperature): hidden [M, D] -> [M] int64.

    temperature: 0 takes the argmax. suppress [S] int64: ids that are never drawn. rows: as in `nll`.
    uniform [M] fp64 in [0, 1): used instead of numbers from the generator.
    Raises ValueError for a negative temperature and for suppressed ids outside [0, V) or too many.

    Inverts the distribution function at one uniform number per row, drawn for all rows at once: exact, and
    the same for every chunk size. Gumbel noise would need V random numbers per row, which cost more than the
    logits on a CPU.
    """
    check_hidden(head, hidden, rows=rows)
    check_suppress(suppress, len(head.weight))
    if temperature < 0:
        raise ValueError(f"temperature = {temperature}: must be at least 0")
    tokens = torch.empty(len(hidden), dtype=torch.long, device=hidden.device)
    if uniform is None:
        source = hidden.device if generator is None else generator.device
        uniform = torch.rand(len(hidden), dtype=torch.float64, generator=generator, device=source)
    elif uniform.shape != tokens.shape or uniform.dtype != torch.float64:
        raise ValueError(
            f"uniform is {uniform.dtype} of shape {tuple(uniform.shape)}: must be float64 of shape "
            f"{tuple(tokens.shape)}"
        )
    uniform = uniform.to(hidden.device)
    for at, z in chunks(hidden, head, rows):
        z = at_temperature(z, suppress, temperature or 1.0)
        if temperature == 0:
            tokens[at] = z.argmax(dim=1)
        else:
            tokens[at] = _invert(torch.softmax(z, dim=1, out=z), uniform[at])
    return tokens


def _invert(p: Tensor, uniform: Tensor) -> Tensor:
    """Find the first index [M] where the running sum of p [M, V] exceeds uniform [M] * the sum of all p.

    First among groups of 128, then inside one: short running sums are accurate and quick.
    """
    M, V = p.shape
    whole = V // _GROUP * _GROUP
    sums = p[:, :whole].view(M, -1, _GROUP).sum(-1)
    if whole < V:
        sums = torch.cat([sums, p[:, whole:].sum(-1, keepdim=True)], dim=1)
    running = sums.double().cumsum(1)
    wanted = uniform * running[:, -1]
    group = torch.searchsorted(running, wanted[:, None], right=True).squeeze(1)
    # rounding may point past the end or at a group of probability 0: step back to the last positive one
    group = torch.minimum(group, _last_positive(sums))
    rest = wanted - torch.where(group > 0, running.gather(1, (group - 1).clamp(min=0)[:, None]).squeeze(1), 0)
    columns = group[:, None] * _GROUP + torch.arange(_GROUP, device=p.device)
    inside = p.gather(1, columns.clamp(max=V - 1)).masked_fill(columns >= V, 0)
    at = torch.searchsorted(inside.double().cumsum(1), rest[:, None], right=True).squeeze(1)
    return group * _GROUP + torch.minimum(at, _last_positive(inside))


def _last_positive(values: Tensor) -> Tensor:
    """Find the last positive column of each row: [M, K] -> [M]."""
    column = torch.arange(values.shape[1], device=values.device)
    return torch.where(values > 0, column, 0).amax(dim=1)
