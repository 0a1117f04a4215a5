"""The head, its logits of a few rows at once or of many rows in chunks, and the checks of their operands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

_F = TypeVar("_F", bound=Callable[..., Any])

WORKSPACE_BYTES = 128 << 20  # one chunk of logits: 1,024 rows of 32k in fp32, large enough for fast products


class Workspace:
    """Keep the memory of one chunk of logits between the calls of a head.

    A CPU's fresh pages cost more than the logits in them; a GPU's allocator keeps freed memory by itself, so
    none is taken there.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def take(self, rows: int, V: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return memory [rows, V] on the device of `like`, not initialised; the next taker overwrites it."""
        old = self._memory
        if old is None or old.numel() < rows * V or (old.dtype, old.device) != (dtype, like.device):
            self._memory = like.new_empty(rows * V, dtype=dtype)
        return self._memory[: rows * V].view(rows, V)  # type: ignore[index]


@dataclass(frozen=True)
class LinearHead:
    """Map hidden states to logits: softcap * tanh((hidden @ weight.T + bias) * logit_scale / softcap).

    weight [V, D]; bias [V] or None; logit_scale as in Cohere and (its reciprocal) Granite; softcap as in
    Gemma 2, or None for no cap.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    workspace: Workspace = field(default_factory=Workspace, repr=False, compare=False)

    def only(self, tokens: Tensor) -> LinearHead:
        """Return the head of tokens [S] int64 alone; its softmax is renormalised over them."""
        bias = None if self.bias is None else self.bias[tokens]
        return LinearHead(self.weight[tokens], bias, self.logit_scale, self.softcap)


def result_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of logits and results: fp32, or fp64 for fp64 hidden states."""
    return torch.promote_types(hidden.dtype, torch.float32)


def without_autocast(function: _F) -> _F:
    @wraps(function)
    def wrapped(*args, **kwargs):
        device = next(x.device for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        with torch.autocast(device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


@without_autocast
def logits(hidden: Tensor, head: LinearHead) -> Tensor:
    """Compute all logits of a few rows: hidden [M, D] -> [M, V] fp32 (fp64 for fp64), differentiable."""
    check_hidden(head, hidden)
    high = result_dtype(hidden)
    z = hidden.to(high) @ head.weight.to(high).T
    if head.bias is not None:
        z = z + head.bias.to(high)
    z = z * head.logit_scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


@without_autocast
def mixed_logits(base_hidden: Tensor, thought_hidden: Tensor, mix_weight: Tensor, head: LinearHead) -> Tensor:
    """Compute (1 - w) * logits(base) + w * logits(thought) of a few rows, differentiable.

    base_hidden, thought_hidden [M, D], mix_weight [M] -> [M, V] fp32 (fp64 for fp64).
    """
    check_mixture(base_hidden, thought_hidden, mix_weight, head)
    if head.softcap is None:
        return logits(mix(base_hidden, thought_hidden, mix_weight), head)
    w = mix_weight.to(result_dtype(base_hidden))[:, None]
    return (1 - w) * logits(base_hidden, head) + w * logits(thought_hidden, head)


def mix(base_hidden: Tensor, thought_hidden: Tensor, mix_weight: Tensor) -> Tensor:
    """Compute (1 - w) * base + w * thought [M, D] in fp32 (fp64 for fp64)."""
    high = result_dtype(base_hidden)
    w = mix_weight.to(high)[:, None]
    return (1 - w) * base_hidden.to(high) + w * thought_hidden.to(high)


def chunk_rows(vocabulary: int, bytes_per_logit: int = 4) -> int:
    """Return how many rows of logits fit the workspace; at least 16, for the matrix product's sake."""
    return max(16, WORKSPACE_BYTES // (vocabulary * bytes_per_logit))


def chunks(hidden: Tensor, head: LinearHead, rows: int | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield (slice, logits [m, V] in `result_dtype`) of each chunk; the next one overwrites them on a CPU."""
    V, high = len(head.weight), result_dtype(hidden)
    rows = rows or chunk_rows(V, high.itemsize)
    # tensor cores round only the inputs of a product of halves; its sums and its result are fp32
    half = hidden.is_cuda and hidden.dtype == head.weight.dtype != high
    weight = head.weight if half else head.weight.to(high)  # cast once, not once a chunk
    buffer = None if hidden.is_cuda else head.workspace.take(min(rows, len(hidden)), V, hidden, high)
    for first in range(0, len(hidden), rows):
        at = slice(first, min(first + rows, len(hidden)))
        if half:
            z = torch.mm(hidden[at], weight.T, out_dtype=high)
        else:
            out = None if buffer is None else buffer[: at.stop - first]
            z = torch.mm(hidden[at].to(high), weight.T, out=out)
        if head.bias is not None:
            z += head.bias.to(high)
        if head.logit_scale != 1.0:
            z *= head.logit_scale
        if head.softcap is not None:
            z.div_(head.softcap).tanh_().mul_(head.softcap)
        yield at, z


def at_temperature(z: Tensor, suppress: Tensor | None, temperature: float) -> Tensor:
    """Divide z [m, V] by the temperature in place, with the suppressed ids at -inf.

    The rows are shifted by their maxima, so that no temperature overflows.
    """
    if suppress is not None:
        z.index_fill_(1, suppress, -torch.inf)
    if temperature != 1.0:
        z.sub_(z.amax(dim=1, keepdim=True)).div_(temperature)
    return z


def check_hidden(head: LinearHead, *hidden: Tensor, rows: int | None = None) -> None:
    V, D = head.weight.shape
    if rows is not None and rows < 1:
        raise ValueError(f"rows = {rows}: must be at least 1, or None for as many as fit the workspace")
    for x in hidden:
        if x.ndim != 2 or x.shape[1] != D:
            raise ValueError(f"hidden has shape {tuple(x.shape)}: must be [rows, {D}]")
    if head.bias is not None and head.bias.shape != (V,):
        raise ValueError(f"bias has shape {tuple(head.bias.shape)}: must be [{V}]")


def check_mixture(base_hidden, thought_hidden, mix_weight, head: LinearHead, rows: int | None = None) -> None:
    check_hidden(head, base_hidden, thought_hidden, rows=rows)
    shape = tuple(base_hidden.shape)
    if thought_hidden.shape != shape:
        raise ValueError(
            f"thought_hidden has shape {tuple(thought_hidden.shape)}: must be that of base_hidden, {shape}"
        )
    if mix_weight.shape != shape[:1]:
        raise ValueError(
            f"mix_weight has shape {tuple(mix_weight.shape)}: must be {shape[:1]}, one weight per row"
        )


def check_ids(name: str, ids: Tensor, rows: int, V: int) -> None:
    if ids.shape != (rows,) or ids.dtype != torch.long:
        raise ValueError(
            f"{name} is {ids.dtype} of shape {tuple(ids.shape)}: must be int64 of shape {(rows,)}"
        )
    if ids.is_cuda:  # looking at them would synchronise; the gather itself asserts
        return
    outside = (ids < 0) | (ids >= V)
    if bool(outside.any()):
        raise ValueError(f"{name} = {int(ids[outside][0])}: must be in [0, {V})")


def check_suppress(suppress: Tensor | None, V: int) -> None:
    if suppress is None:
        return
    if suppress.ndim != 1 or suppress.dtype != torch.long or len(suppress) >= V:
        raise ValueError(
            f"suppress is {suppress.dtype} of shape {tuple(suppress.shape)}: must be int64 [S] with S < {V}"
        )
    check_ids("suppress", suppress, len(suppress), V)
