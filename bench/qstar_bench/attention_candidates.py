"""What `qstar bench attention` runs: our operator, and the baselines on the same queries, keys and values.

Blocks are the training step's: R at every token t = 1 .. T, each seeing the prefix [0, t) and its own slots.

- causal: plain causal attention of the same queries over the prefix alone, the slots folded into the query
  heads of their group (`F.scaled_dot_product_attention(is_causal=True, enable_gqa=True)`): no own part.
- dense: one dense mask over [prefix | all own slots], as in the published code.
- flex: compiled FlexAttention under the block mask of the same rule, made once; forward only on a CPU.
- flash: the operator with impl="flash", stock flash kernels for the prefix; on a GPU only.

The sampling pass is one query slot of every block with L own keys, without gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from qstar_kernels import thought_attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Operands = tuple[Tensor, ...]


@dataclass(frozen=True)
class Shape:
    """T prefix keys, L slots of a block, R blocks at each token, Hq query and Hkv key-value heads, D wide."""

    T: int
    L: int
    R: int
    Hq: int
    Hkv: int
    D: int

    def at(self, **changes: int) -> Shape:
        return replace(self, **changes)


class Problem:
    """Random operands of a shape, of one row: q, k, v [1, N, L, H, D]; k_prefix, v_prefix [1, T, Hkv, D]."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str):
        self.shape, s = shape, shape
        self.N = s.T * s.R
        source = torch.Generator(device).manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=source, device=device).to(dtype).requires_grad_()

        self.q = random(1, self.N, s.L, s.Hq, s.D)
        self.k, self.v = (random(1, self.N, s.L, s.Hkv, s.D) for _ in range(2))
        self.k_prefix, self.v_prefix = (random(1, s.T, s.Hkv, s.D) for _ in range(2))
        self.prefix_end = torch.arange(1, s.T + 1, device=device).repeat_interleave(s.R)[None]
        self.leaves = (self.q, self.k, self.v, self.k_prefix, self.v_prefix)
        self.d_out = random(*self.q.shape).detach()
        self.some = torch.linspace(0, self.N - 1, min(self.N, 9), device=device).long()
        self.truth = self._reference(torch.float64)

    def _reference(self, dtype: torch.dtype) -> Tensor:
        """The dense mask's definition on some blocks, computed in `dtype`: [1, some, L, Hq, D]."""
        with torch.no_grad():
            q, k, v = (x[:, self.some].to(dtype) for x in (self.q, self.k, self.v))
            prefix = self.k_prefix.to(dtype), self.v_prefix.to(dtype)
            return thought_attention(q, k, v, *prefix, self.prefix_end[:, self.some], impl="reference")[0]

    def naive_error(self) -> float:
        """The largest error of the dense mask in the operands' own dtype."""
        return float((self._reference(self.q.dtype).double() - self.truth).abs().max())

    def error(self, out: Tensor) -> float:
        """The largest error of out [1, N, L, Hq, D] on some blocks."""
        return float((out.detach()[:, self.some].double() - self.truth).abs().max())

    def slots_visible(self) -> tuple[float, float]:
        """Query-key pairs of one query head: over the prefix, and over the own slots."""
        s = self.shape
        return self.N * s.L * (s.T + 1) / 2, self.N * s.L * (s.L + 1) / 2


@dataclass(frozen=True)
class Candidate:
    """run(): one timed call; gives_out: what it returns is the operator's whole output, like q."""

    name: str
    what: str
    run: Callable[[], Any]
    flops: float
    gives_out: bool = False


def candidates(problem: Problem, impl: str, baselines: tuple[str, ...]) -> Iterator[Candidate]:
    """Ours first, then the baselines: forward, forward + backward ("both") and sampling, where each can."""
    prefix, own = problem.slots_visible()
    s = problem.shape
    product = 2 * s.Hq * s.D  # FLOPs of a query-key pair in one matrix product, all heads
    makers: dict[str, tuple[Callable[[], Tensor], Operands, float]] = {
        "ours": (lambda: _ours(problem, impl), problem.leaves, prefix + own),
        "causal": (*_causal(problem), prefix),
        "dense": (_dense(problem), problem.leaves, prefix + own),
        "flash": (lambda: _ours(problem, "flash"), problem.leaves, prefix + own),
    }
    if "flex" in baselines:
        makers["flex"] = _flex(problem), problem.leaves, prefix + own
    for name in ("ours", *baselines):
        forward, leaves, pairs = makers[name]
        yield Candidate(name, "forward", torch.no_grad()(forward), 2 * product * pairs, name != "causal")
        if name != "flex" or problem.q.is_cuda:
            # the backward has five products: the scores are made again
            yield Candidate(name, "both", _both(problem, forward, leaves), 7 * product * pairs)
        if name == "ours":
            pairs = prefix / s.L + problem.N * s.L
            yield Candidate(name, "sampling", _sampling(problem, impl), 2 * product * pairs)
        if name == "causal":
            sampling = torch.no_grad()(_causal(problem, slots=1)[0])
            yield Candidate(name, "sampling", sampling, 2 * product * prefix / s.L)


def _both(problem: Problem, forward: Callable[[], Tensor], leaves: Operands) -> Callable[[], object]:
    """Forward and the gradients of all operands; d_out is given, so nothing else is timed."""

    def run() -> object:
        out = forward()
        return torch.autograd.grad(out, leaves, problem.d_out.view_as(out))

    return run


def _ours(problem: Problem, impl: str) -> Tensor:
    p = problem
    return thought_attention(p.q, p.k, p.v, p.k_prefix, p.v_prefix, p.prefix_end, impl=impl)[0]


def _sampling(problem: Problem, impl: str) -> Callable[[], Tensor]:
    p = problem
    q = p.q[:, :, -1:].detach().contiguous()

    @torch.no_grad()
    def run() -> Tensor:
        return thought_attention(q, p.k, p.v, p.k_prefix, p.v_prefix, p.prefix_end, impl=impl)[0]

    return run


def _causal(problem: Problem, slots: int | None = None) -> tuple[Callable[[], Tensor], Operands]:
    """Square causal attention: row t of a group's head g * R * L + (r, i) is slot i of the r-th block at t.

    The operands are laid out so before any timing: the baseline pays for no copy.
    """
    s = problem.shape
    L = slots or s.L
    group = s.Hq // s.Hkv
    q = problem.q.detach()[0, :, -L:].view(s.T, s.R, L, s.Hkv, group, s.D)
    q = q.permute(3, 4, 1, 2, 0, 5).reshape(1, s.Hq * s.R * L, s.T, s.D).contiguous().requires_grad_()
    k, v = (
        x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (problem.k_prefix, problem.v_prefix)
    )
    return lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), (q, k, v)


def _rows(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """q [1, Hq, N * L, D]; keys and values [1, Hkv, T + N * L, D]."""
    p = problem

    def joined(prefix: Tensor, own: Tensor) -> Tensor:
        return torch.cat([prefix, own.flatten(1, 2)], dim=1).transpose(1, 2)

    return (
        p.q.flatten(1, 2).transpose(1, 2),
        joined(p.k_prefix, p.k),
        joined(p.v_prefix, p.v),
    )


def _dense(problem: Problem) -> Callable[[], Tensor]:
    s, N, device = problem.shape, problem.N, problem.q.device
    row = torch.arange(N * s.L, device=device)[:, None]
    key = torch.arange(s.T + N * s.L, device=device)
    mask: list[Tensor] = []

    def forward() -> Tensor:
        if not mask:  # made when it is first used: at T 1,024 it takes 220 MB
            own = key - s.T
            sees_own = (own >= 0) & (own // s.L == row // s.L) & (own <= row)
            mask.append(((key < s.T) & (key < problem.prefix_end[0][row // s.L])) | sees_own)
        q, k, v = _rows(problem)
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask[0], enable_gqa=True)
        return out.transpose(1, 2).reshape(problem.q.shape)

    return forward


def _flex(problem: Problem) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    s, end = problem.shape, problem.prefix_end[0]
    T, L = s.T, s.L

    def rule(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        own = key - T
        return ((key < T) & (key < end[row // L])) | ((key >= T) & (own // L == row // L) & (own <= row))

    rows = problem.N * L
    make_mask = torch.compile(create_block_mask)  # not compiled, it would hold the dense mask
    block_mask = make_mask(rule, None, None, rows, T + rows, device=problem.q.device.type)
    compiled = torch.compile(flex_attention, dynamic=False)

    def forward() -> Tensor:
        q, k, v = _rows(problem)
        if not q.is_cuda:
            q, k, v = (x.detach() for x in (q, k, v))
        out = compiled(q, k, v, block_mask=block_mask, enable_gqa=True)
        return out.transpose(1, 2).reshape(problem.q.shape)

    return forward
