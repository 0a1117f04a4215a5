"""Define what `qstar bench attention` runs: our operator's implementations and baselines on the same queries.

- ours: the operator with the first `--impl`; impl=NAME: with each further one.
- causal: plain causal attention of the same queries over the prefix alone, the slots folded into the query
  heads of their group (`F.scaled_dot_product_attention(is_causal=True, enable_gqa=True)`): no own part.
- dense: one dense mask over [prefix | all own slots], as in the published code.
- flex: compiled FlexAttention under the block mask of the same rule, made once; forward only on a CPU.
- flash: the operator with impl="flash", stock flash kernels for the prefix; on a GPU only.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from qstar_kernels import resolve_impl, thought_attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qstar_bench.attention.attention_problem import Problem

BASELINES = ("causal", "dense", "flex", "flash")


class Way:
    """Compute a problem's attention in a layout of its own.

    own: whether the blocks' own slots are part of it; rounds_sums: whether the gradients of keys come from
    torch's kernels, some of which (those for CPUs) sum them over rows and heads in a low precision; leaves:
    by name, what the backward gives gradients of.
    """

    own = True
    rounds_sums = True

    def __init__(self, problem: Problem):
        self.problem = problem
        self.leaves: dict[str, Tensor] = problem.leaves

    def forward(self) -> Tensor:
        """Give the output, in the layout of `fold`."""
        raise NotImplementedError

    def sampling(self) -> Tensor:
        """Give the output of the last query slot of every block: [1, N, 1, Hq, D] in the layout of `fold`."""
        raise NotImplementedError

    def fold(self, x: Tensor) -> Tensor:
        """Bring x [1, N, slots, Hq, D] into this way's layout of queries."""
        return x

    def unfold(self, name: str, x: Tensor) -> Tensor:
        """Bring an output, or the gradient of the leaf `name`, into the problem's layout."""
        return x


class Operator(Way):
    """Call `thought_attention` with one of its implementations."""

    def __init__(self, problem: Problem, impl: str):
        super().__init__(problem)
        self.impl = impl
        self.rounds_sums = impl in ("flash", "flex")
        self.last = problem.q.detach()[:, :, -1:].contiguous()

    def forward(self) -> Tensor:
        p = self.problem
        return thought_attention(p.q, p.k, p.v, p.k_prefix, p.v_prefix, p.prefix_end, impl=self.impl)[0]

    def sampling(self) -> Tensor:
        p = self.problem
        return thought_attention(self.last, p.k, p.v, p.k_prefix, p.v_prefix, p.prefix_end, impl=self.impl)[0]


class Causal(Way):
    """Compute square causal attention: row t of a group's head g * R * L + (r, i) is slot i of the r-th block
    at t.

    The operands are laid out so before any timing: the baseline pays for no copy.
    """

    own = False

    def __init__(self, problem: Problem):
        super().__init__(problem)
        operands = {"q": self.fold(problem.q.detach())}
        for name in ("k_prefix", "v_prefix"):
            operands[name] = problem.leaves[name].detach().transpose(1, 2).contiguous()
        self.leaves = {name: x.requires_grad_() for name, x in operands.items()}
        self.last = self.fold(problem.q.detach()[:, :, -1:])

    def forward(self) -> Tensor:
        return self._attend(self.leaves["q"])

    def sampling(self) -> Tensor:
        return self._attend(self.last)

    def _attend(self, q: Tensor) -> Tensor:
        keys, values = self.leaves["k_prefix"], self.leaves["v_prefix"]
        return scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)

    def fold(self, x: Tensor) -> Tensor:
        s = self.problem.shape
        x = x[0].unflatten(0, (s.T, s.R)).unflatten(3, (s.Hkv, -1))  # [T, R, L, Hkv, G, D]
        return x.permute(3, 4, 1, 2, 0, 5).reshape(1, -1, s.T, s.D).contiguous()

    def unfold(self, name: str, x: Tensor) -> Tensor:
        if "prefix" in name:
            return x.transpose(1, 2)
        s = self.problem.shape
        x = x.unflatten(1, (s.Hkv, s.Hq // s.Hkv, s.R, -1))[0]  # [Hkv, G, R, L, T, D]
        return x.permute(4, 2, 3, 0, 1, 5).flatten(3, 4).flatten(0, 1)[None]


class _Rows(Way):
    """Lay out all slots as rows of one attention over [prefix | all own slots]."""

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """q [1, Hq, N * L, D]; keys and values [1, Hkv, T + N * L, D]."""
        p = self.problem

        def joined(prefix: Tensor, own: Tensor) -> Tensor:
            return torch.cat([prefix, own.flatten(1, 2)], dim=1).transpose(1, 2)

        return p.q.flatten(1, 2).transpose(1, 2), joined(p.k_prefix, p.k), joined(p.v_prefix, p.v)

    def blocks(self, rows: Tensor) -> Tensor:
        return rows.transpose(1, 2).reshape(self.problem.q.shape)


class Dense(_Rows):
    """Attend under one dense mask, made at its first use: at T 1,024 it takes 220 MB."""

    mask: Tensor | None = None

    def forward(self) -> Tensor:
        if self.mask is None:
            s, end = self.problem.shape, self.problem.prefix_end[0]
            row = torch.arange(s.N * s.L, device=end.device)[:, None]
            key = torch.arange(s.T + s.N * s.L, device=end.device)
            own = key - s.T
            sees_own = (own >= 0) & (own // s.L == row // s.L) & (own <= row)
            self.mask = ((key < s.T) & (key < end[row // s.L])) | sees_own
        return self.blocks(scaled_dot_product_attention(*self.rows(), attn_mask=self.mask, enable_gqa=True))


class Flex(_Rows):
    """Attend by compiled FlexAttention, which on a GPU holds neither the mask nor the scores."""

    def __init__(self, problem: Problem):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        super().__init__(problem)
        s, end, device = problem.shape, problem.prefix_end[0], problem.q.device
        T, L = s.T, s.L

        def rule(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
            own = key - T
            return ((key < T) & (key < end[row // L])) | ((key >= T) & (own // L == row // L) & (own <= row))

        rows = s.N * L
        self.mask = torch.compile(create_block_mask)(rule, None, None, rows, T + rows, device=device.type)
        self.compiled = torch.compile(flex_attention, dynamic=False)

    def forward(self) -> Tensor:
        q, k, v = self.rows()
        if not q.is_cuda:
            q, k, v = (x.detach() for x in (q, k, v))
        return self.blocks(self.compiled(q, k, v, block_mask=self.mask, enable_gqa=True))


def way(problem: Problem, name: str, impl: str) -> Way:
    """Build the way of that name; impl: what `ours` runs."""
    if name in ("causal", "dense", "flex"):
        return {"causal": Causal, "dense": Dense, "flex": Flex}[name](problem)
    return Operator(problem, impl_of(name, impl))


def impl_of(name: str, impl: str) -> str:
    """Give the `impl` of `thought_attention` for a candidate; impl: what ours runs."""
    return impl if name == "ours" else name.removeprefix("impl=")


def can(name: str, impl: str, device: str) -> tuple[str, ...]:
    """List the passes that a candidate has."""
    training = ("forward", "backward", "both")
    if name == "causal":
        return (*training, "sampling")
    if name in ("dense", "flash"):
        return training
    if name == "flex":
        return training if device != "cpu" else ("forward",)
    has_backward = device != "cpu" or resolve_impl(impl_of(name, impl), device) != "flex"
    return (*training, "sampling") if has_backward else ("forward", "sampling")


@dataclass(frozen=True)
class Candidate:
    """Hold what is timed: run(prepare()), of which only run; name: the way's, what: the pass."""

    name: str
    what: str
    run: Callable[[Any], Any]
    flops: float
    prepare: Callable[[], Any] = lambda: None


def candidates(name: str, one: Way, passes: tuple[str, ...]) -> Iterator[Candidate]:
    """Yield a way's passes. d_out is given, so that nothing but the pass is timed; the backward's graph is
    made before its clock runs."""
    leaves, d_out = tuple(one.leaves.values()), one.fold(one.problem.d_out)

    def without_gradient(forward: Callable[[], Tensor], _: None) -> Tensor:
        with torch.no_grad():
            return forward()

    def backward(out: Tensor) -> object:
        return torch.autograd.grad(out, leaves, d_out)

    runs: dict[str, dict[str, Callable]] = {
        "forward": {"run": partial(without_gradient, one.forward)},
        "backward": {"run": backward, "prepare": one.forward},
        "both": {"run": lambda _: backward(one.forward())},
        "sampling": {"run": partial(without_gradient, one.sampling)},
    }
    for what in passes:
        yield Candidate(name, what, flops=one.problem.shape.flops(what, one.own), **runs[what])
