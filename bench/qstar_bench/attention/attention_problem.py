"""The problem that `qstar bench attention` measures: its sizes, what they cost, its operands, and the truth.

Blocks are the training step's: R at every token t = 1 .. T, each seeing the prefix [0, t) and its own slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from qstar_kernels import thought_attention
from torch import Tensor

# matrix products over the visible cells: q k and p v; backward q k again, dv, dp, dq and dk
PRODUCTS = {"forward": 2, "backward": 5, "both": 7, "sampling": 2}
PASSES = tuple(PRODUCTS)


@dataclass(frozen=True)
class Shape:
    """T prefix keys, L slots of a block, R blocks at each token, Hq query and Hkv key-value heads, D wide.

    The sampling pass is one query slot of every block with L own keys, without gradient.
    """

    T: int
    L: int
    R: int
    Hq: int
    Hkv: int
    D: int

    def at(self, **changes: int) -> Shape:
        return replace(self, **changes)

    @property
    def N(self) -> int:
        """Blocks."""
        return self.T * self.R

    def cells(self, what: str = "both") -> tuple[float, float]:
        """Count the query-key pairs that a pass needs for one query head: over the prefix, and over the own
        slots."""
        if what == "sampling":
            return self.N * (self.T + 1) / 2, float(self.N * self.L)
        return self.N * self.L * (self.T + 1) / 2, self.N * self.L * (self.L + 1) / 2

    def flops(self, what: str, own: bool = True) -> float:
        """Count the FLOPs of a pass: only of visible cells, whatever else an implementation computes."""
        prefix, own_cells = self.cells(what)
        return PRODUCTS[what] * 2 * self.Hq * self.D * (prefix + own * own_cells)

    def bytes(self, what: str, itemsize: int) -> float:
        """Count the bytes of a pass in which each operand and result moves once (lse in fp32)."""
        slots = self.N if what == "sampling" else self.N * self.L
        q, lse = slots * self.Hq * self.D * itemsize, 4 * slots * self.Hq
        keys = 2 * (self.N * self.L + self.T) * self.Hkv * self.D * itemsize
        forward, backward = q + keys + q + lse, (q + keys + 2 * q + lse) + (q + keys)
        return {"backward": backward, "both": forward + backward}.get(what, forward)

    def card(self, itemsize: int) -> dict[str, float]:
        """Give the costs known before any measurement; cells are those of one query head."""
        needed, dense = sum(self.cells()), self.N * self.L * (self.T + self.N * self.L)
        costs = {f"{what} GFLOP": self.flops(what) / 1e9 for what in ("forward", "backward", "sampling")}
        moved = {f"{what} MB": self.bytes(what, itemsize) / 1e6 for what in ("forward", "backward")}
        sizes = {name: getattr(self, name) for name in ("T", "L", "R", "N", "Hq", "Hkv", "D")}
        cells = {"cells needed": needed, "cells dense": dense, "needed %": 100 * needed / dense}
        return sizes | costs | moved | cells


class Problem:
    """Make random operands of a shape, for one row: q, k, v [1, N, L, H, D]; k_prefix, v_prefix [1, T, Hkv,
    D].

    `some` [n] are blocks by which implementations are judged: spread over the row, each with a neighbour.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str):
        self.shape, s = shape, shape
        source = torch.Generator(device).manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=source, device=device).to(dtype).requires_grad_()

        self.q = random(1, s.N, s.L, s.Hq, s.D)
        self.k, self.v = (random(1, s.N, s.L, s.Hkv, s.D) for _ in range(2))
        self.k_prefix, self.v_prefix = (random(1, s.T, s.Hkv, s.D) for _ in range(2))
        self.prefix_end = torch.arange(1, s.T + 1, device=device).repeat_interleave(s.R)[None]
        self.leaves = {
            "q": self.q, "k": self.k, "v": self.v, "k_prefix": self.k_prefix, "v_prefix": self.v_prefix,
        }  # fmt: skip
        self.d_out = random(*self.q.shape).detach()
        spread = torch.linspace(0, s.N - 1, 5, device=device).long()
        self.some = torch.cat([spread, spread + 1]).clamp(max=s.N - 1).unique()

    def definition(self, dtype: torch.dtype, own: bool = True) -> dict[str, Tensor]:
        """{"out", "dq", "dk", ...} by the dense mask, computed in `dtype`, of `some` blocks, when d_out is
        zero for all others: out, dq [1, n, L, Hq, D], dk, dv [1, n, L, Hkv, D], all of dk_prefix, dv_prefix.

        own False: attention over the prefix alone, without dk and dv.
        """
        leaves = {
            name: (x if "prefix" in name else x[:, self.some]).detach().to(dtype).requires_grad_()
            for name, x in self.leaves.items()
            if own or name not in ("k", "v")
        }
        end = self.prefix_end[:, self.some]
        if own:
            out = _operator(leaves, end)
        else:
            out = _prefix_attention(leaves["q"], leaves["k_prefix"], leaves["v_prefix"], end)
        gradients = torch.autograd.grad(out, tuple(leaves.values()), self.d_out[:, self.some].to(dtype))
        return {"out": out.detach()} | {f"d{name}": x for name, x in zip(leaves, gradients)}


def _operator(leaves: dict[str, Tensor], end: Tensor) -> Tensor:
    """Compute one key-value head at a time: the definition holds the keys once for every block and query
    head."""
    heads = []
    queries = leaves["q"].unflatten(3, (leaves["k"].shape[3], -1))
    for h in range(leaves["k"].shape[3]):
        k, v, k_prefix, v_prefix = (x[..., h : h + 1, :] for name, x in leaves.items() if name != "q")
        q = queries[:, :, :, h]
        heads.append(thought_attention(q, k, v, k_prefix, v_prefix, end, impl="reference")[0])
    return torch.cat(heads, dim=3)


def _prefix_attention(q: Tensor, k_prefix: Tensor, v_prefix: Tensor, end: Tensor) -> Tensor:
    """softmax(q k_prefix[:end]^T / sqrt(D)) v_prefix[:end]."""
    grouped = q.unflatten(3, (k_prefix.shape[2], -1))
    scores = torch.einsum("bnlhgd,bthd->bnlhgt", grouped, k_prefix) * q.shape[-1] ** -0.5
    hidden = torch.arange(k_prefix.shape[1], device=q.device) >= end[..., None]
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    probability = scores.masked_fill(hidden[:, :, None, None, None], -torch.inf).softmax(-1).to(q.dtype)
    return torch.einsum("bnlhgt,bthd->bnlhgd", probability, v_prefix).flatten(3, 4)
