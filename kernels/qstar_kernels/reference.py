"""Thought attention by its definition, a dense mask over [prefix | own slots]: the truth of every test.

Legend: B rows, N blocks, Lq queries, Lk own keys, T prefix keys, Hq / Hkv query / key-value heads, D head
width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qstar_kernels.operands import Operands


def visible(operands: Operands) -> Tensor:
    """Mark what each query sees: [B, N, Lq, T + Lk] bool. Slot s of a block is at position prefix_end + s."""
    start, end = operands.prefix_start, operands.prefix_end
    assert start is not None
    T, Lq, Lk, window = operands.T, operands.Lq, operands.Lk, operands.window
    key, slot = torch.arange(T, device=end.device), torch.arange(Lk, device=end.device)
    query = slot[Lk - Lq :, None]
    prefix = (key >= start[..., None, None]) & (key < end[..., None, None])
    prefix = prefix.expand(*end.shape, Lq, T)
    block = (slot <= query) if operands.own == "causal" else torch.ones_like(slot <= query)
    if window is not None:
        prefix = prefix & (end[..., None, None] + query - key < window)
        block = block & (query - slot < window)
    return torch.cat([prefix, block.expand(*end.shape, Lq, Lk)], dim=-1)


def reference(operands: Operands) -> tuple[Tensor, Tensor]:
    """Return softmax(mask(scale * q [k_prefix ; k]^T)) [v_prefix ; v] and its log-sum-exp.

    Autograd does the backward. prefix_start must not be None.
    """
    N, group, softcap, sinks = operands.N, operands.G, operands.softcap, operands.sinks

    def keys(prefix: Tensor, own_slots: Tensor) -> Tensor:  # [B, N, T + Lk, Hq, D]
        joined = torch.cat([prefix[:, None].expand(-1, N, -1, -1, -1), own_slots], dim=2)
        return joined.repeat_interleave(group, dim=3)

    scores = torch.einsum("bnqhd,bnkhd->bnqhk", operands.q, keys(operands.k_prefix, operands.k))
    scores = scores.to(operands.high) * operands.scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible(operands)[:, :, :, None], -torch.inf)
    lse = scores.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype).expand_as(lse))
    probability = torch.exp(scores - lse[..., None]).to(operands.v.dtype)
    return torch.einsum("bnqhk,bnkhd->bnqhd", probability, keys(operands.v_prefix, operands.v)), lse
