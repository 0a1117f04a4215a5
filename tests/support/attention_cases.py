"""Problems for thought attention, and what implementations are compared by: out, lse and each gradient."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from qstar_kernels import thought_attention
from torch import Tensor

GRADIENTS = ("dq", "dk", "dv", "dk_prefix", "dv_prefix", "dsinks")


@dataclass(frozen=True)
class Case:
    """B rows, N blocks, Lq queries and Lk slots (None: Lq), T prefix keys, Hq / Hkv heads, D width.

    ranges: how the blocks lie on the prefix, see `prefix_ranges`; scattered: no operand is contiguous.
    """

    B: int = 2
    N: int = 5
    Lq: int = 3
    Lk: int | None = None
    T: int = 17
    Hq: int = 4
    Hkv: int = 2
    D: int = 8
    ranges: str = "causal"
    own: str = "causal"
    scale: float | None = None
    softcap: float | None = None
    window: int | None = None
    sinks: bool = False
    scattered: bool = False

    def __str__(self) -> str:
        """What differs from the defaults: the test's id."""
        default = asdict(Case())
        shown = [f"{name}={value}" for name, value in asdict(self).items() if value != default[name]]
        return ",".join(shown) or "default"


def prefix_ranges(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """prefix_start, prefix_end [B, N] int32."""
    B, N, T = case.B, case.N, case.T

    def draw() -> Tensor:
        return torch.randint(0, T + 1, (B, N), generator=generator)

    def sorted_pair() -> tuple[Tensor, Tensor]:
        start, end = torch.stack([draw(), draw()]).sort(dim=0).values
        return start, end

    start = torch.zeros(B, N, dtype=torch.long)
    if case.ranges == "causal":  # growing evenly; 1 .. T when N = T
        end = (torch.arange(1, N + 1) * T // max(N, 1)).expand(B, N)
    elif case.ranges == "unsorted":
        end = draw()
    elif case.ranges == "subset":
        end = draw().sort(dim=1).values
    elif case.ranges == "repeated":  # several thoughts at each position
        end = draw().sort(dim=1).values[:, : (N + 2) // 3].repeat_interleave(3, dim=1)[:, :N]
    elif case.ranges == "random":
        start, end = sorted_pair()
    elif case.ranges == "padded":  # every second block is padding
        start, end = sorted_pair()
        start = torch.where(torch.arange(N) % 2 == 0, end, start)
    elif case.ranges == "documents":  # two in each row: no block looks across the border
        end = draw().sort(dim=1).values
        start = torch.where(end > T // 2, T // 2, 0)
    elif case.ranges == "empty":
        start = end = draw()
    else:
        raise ValueError(f"ranges = {case.ranges!r}")
    return start.int(), end.int()


def scattered(x: Tensor) -> Tensor:
    """The same values, head-major with gaps, as a model's projections and caches have them."""
    order = [0, x.ndim - 2, *range(1, x.ndim - 2), x.ndim - 1] if x.ndim > 2 else list(range(x.ndim))
    room = torch.empty(*(x.shape[i] for i in order[:-1]), 2 * x.shape[-1] + 1, dtype=x.dtype)
    inverse = sorted(range(x.ndim), key=order.__getitem__)
    return room[..., 1::2].permute(inverse).copy_(x)


@dataclass
class Problem:
    """The operands of a case by name, and random gradients of out and lse."""

    case: Case
    operands: dict[str, Tensor]
    ranges: dict[str, Tensor]
    d_out: Tensor
    d_lse: Tensor

    @property
    def options(self) -> dict:
        c = self.case
        return {"scale": c.scale, "softcap": c.softcap, "window": c.window, "own": c.own, **self.ranges}

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers (after a rounding to `dtype`), contiguous."""
        high = torch.promote_types(dtype, torch.float32)
        operands = {name: x.to(dtype).contiguous() for name, x in self.operands.items()}
        return Problem(self.case, operands, self.ranges, self.d_out.to(dtype), self.d_lse.to(high))


def problem(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    B, N, Lq, T, Hq, Hkv, D = case.B, case.N, case.Lq, case.T, case.Hq, case.Hkv, case.D
    Lk = Lq if case.Lk is None else case.Lk
    shapes = {
        "q": (B, N, Lq, Hq, D),
        "k": (B, N, Lk, Hkv, D),
        "v": (B, N, Lk, Hkv, D),
        "k_prefix": (B, T, Hkv, D),
        "v_prefix": (B, T, Hkv, D),
    }
    if case.sinks:
        shapes["sinks"] = (Hq,)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    # wider than standard: softmax rows that are far from uniform, and scores that a soft-cap bends
    operands = {name: (1.5 * draw(*shape)).to(dtype) for name, shape in shapes.items()}
    start, end = prefix_ranges(case, generator)
    d_out, d_lse = (
        draw(B, N, Lq, Hq, D).to(dtype),
        draw(B, N, Lq, Hq).to(torch.promote_types(dtype, torch.float32)),
    )
    ranges = {"prefix_start": start, "prefix_end": end}
    if case.scattered:
        operands = {name: scattered(x) for name, x in operands.items()}
        d_out, d_lse = scattered(d_out), scattered(d_lse)
        ranges = {name: scattered(x) for name, x in ranges.items()}
    return Problem(case, operands, ranges, d_out, d_lse)


def run(p: Problem, function=thought_attention, **options) -> dict[str, Tensor]:
    """out, lse and every gradient, by name; function: called like `thought_attention`."""
    leaves = {name: x.detach().requires_grad_() for name, x in p.operands.items()}
    out, lse = function(**leaves, **p.options, **options)
    gradients = torch.autograd.grad([out, lse], list(leaves.values()), [p.d_out, p.d_lse])
    named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients)}
    return {"out": out.detach(), "lse": lse.detach(), **named}


def dense_mask(
    q, k, v, k_prefix, v_prefix, prefix_end, prefix_start, scale, softcap, window, own, sinks=None
):
    """The operator as the published code has it, every query against [prefix | all own slots] under one mask,
    in the operands' dtype: what the errors of fast paths are measured by."""
    B, N, Lq, Hq, D = q.shape
    T, Lk, group = k_prefix.shape[1], k.shape[2], Hq // k.shape[3]
    q = q.flatten(1, 2).transpose(1, 2)  # [B, Hq, N * Lq, D]
    k, v = (
        torch.cat([prefix, x.flatten(1, 2)], dim=1).repeat_interleave(group, dim=2).transpose(1, 2)
        for prefix, x in ((k_prefix, k), (v_prefix, v))
    )
    n, slot = torch.arange(N).repeat_interleave(Lq)[:, None], torch.arange(Lk - Lq, Lk).repeat(N)[:, None]
    key, key_n, key_slot = torch.arange(T), torch.arange(N).repeat_interleave(Lk), torch.arange(Lk).repeat(N)
    end = prefix_end.long()[:, n.squeeze(-1), None]
    prefix = (key >= prefix_start.long()[:, n.squeeze(-1), None]) & (key < end)  # [B, N * Lq, T]
    block = (n == key_n) & ((key_slot <= slot) | (own == "full"))
    if window is not None:
        prefix, block = prefix & (end + slot - key < window), block & (slot - key_slot < window)
    hidden = ~torch.cat([prefix, block.expand(B, -1, -1)], dim=-1)[:, None]
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32))
    scores = scores * (D**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].to(scores.dtype).expand(B, -1, N * Lq, 1)], dim=-1)
    p = torch.softmax(scores, dim=-1)[..., : T + N * Lk].to(v.dtype)
    shape = (B, N, Lq, Hq)
    return (p @ v).transpose(1, 2).reshape(*shape, D), scores.logsumexp(-1).transpose(1, 2).reshape(shape)


def relative_errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """The largest error of each result, relative to the largest true value; NaN and a wrong shape are inf."""
    assert found.keys() == truth.keys()
    return {name: _largest_error(found[name], x) / max(_largest(x), 1e-30) for name, x in truth.items()}


def absolute_errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == truth.keys()
    return {name: _largest_error(found[name], x) for name, x in truth.items()}


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().max()) if x.numel() else 0.0


def _largest_error(found: Tensor, truth: Tensor) -> float:
    if found.shape != truth.shape or not bool(found.isfinite().all()):
        return float("inf")
    return _largest(found.to(truth.dtype) - truth)
