"""Thought attention by its definition: a dense mask over [prefix | own slots]. The truth of every test.

Legend: B rows, N blocks, Lq queries, Lk own keys, T prefix keys, Hq / Hkv query / key-value heads, D head
width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible(
    prefix_start: Tensor, prefix_end: Tensor, T: int, Lq: int, Lk: int, window: int | None, own: str
) -> Tensor:
    """[B, N, Lq, T + Lk] bool: what each query sees. Slot s of a block sits at position prefix_end + s."""
    device = prefix_end.device
    key, slot = torch.arange(T, device=device), torch.arange(Lk, device=device)
    query = slot[Lk - Lq :, None]
    prefix = (key >= prefix_start[..., None, None]) & (key < prefix_end[..., None, None])
    prefix = prefix.expand(*prefix_end.shape, Lq, T)
    block = (slot <= query) if own == "causal" else torch.ones_like(slot <= query)
    if window is not None:
        prefix = prefix & (prefix_end[..., None, None] + query - key < window)
        block = block & (query - slot < window)
    return torch.cat([prefix, block.expand(*prefix_end.shape, Lq, Lk)], dim=-1)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    prefix_end: Tensor,
    prefix_start: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: Tensor | None,
    own: str,
) -> tuple[Tensor, Tensor]:
    """softmax(mask(scale * q [k_prefix ; k]^T)) [v_prefix ; v], and its log-sum-exp; autograd does the
    backward."""
    N, Lq, group = q.shape[1], q.shape[2], q.shape[3] // k.shape[3]
    high = torch.promote_types(q.dtype, torch.float32)

    def keys(prefix: Tensor, own_slots: Tensor) -> Tensor:  # [B, N, T + Lk, Hq, D]
        joined = torch.cat([prefix[:, None].expand(-1, N, -1, -1, -1), own_slots], dim=2)
        return joined.repeat_interleave(group, dim=3)

    scores = torch.einsum("bnqhd,bnkhd->bnqhk", q, keys(k_prefix, k)).to(high) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    mask = visible(prefix_start, prefix_end, k_prefix.shape[1], Lq, k.shape[2], window, own)
    scores = scores.masked_fill(~mask[:, :, :, None], -torch.inf)
    lse = scores.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(high).expand_as(lse))
    probability = torch.exp(scores - lse[..., None])
    out = torch.einsum("bnqhk,bnkhd->bnqhd", probability.to(v.dtype), keys(v_prefix, v))
    return out, lse
