"""Thought attention by torch's FlexAttention, under a block mask of position-major rows.

A user's choice and a baseline, never taken by itself: it compiles for seconds when a shape is new. On a CPU
torch has its forward pass alone: no gradient, lse is NaN there, and sinks, which need lse, are refused.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention


@functools.cache
def _compiled(device: str):
    if device == "cpu":
        # Inductor's C++ for the mask, and of attention for changing shapes, does not always compile there: so
        # the mask is made as a dense one first
        return create_block_mask, torch.compile(flex_attention, dynamic=False)
    # not compiled, the first would hold the dense mask and the second all scores
    return torch.compile(create_block_mask), torch.compile(flex_attention)


def _gives_lse(q: Tensor) -> bool:
    return q.is_cuda


def why_not(device: torch.device | str, dtype: torch.dtype | None = None, D: int | None = None) -> str | None:
    """Why FlexAttention cannot run on such operands, or None when it can. None is not looked at."""
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        return f"the tensors are on {kind}; supported are cpu and cuda"
    if dtype == torch.float64:
        return "q.dtype is torch.float64, supported are fp32, bf16 and fp16"
    if D is not None and D < 16:
        return f"heads are {D} wide, at least 16 are needed"
    return None


def flex(
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
    """See `thought_attention`."""
    B, N, Lq = q.shape[:3]
    T, Lk = k_prefix.shape[1], k.shape[2]
    has_lse = _gives_lse(q)
    if not has_lse and sinks is not None:
        raise ValueError("impl = 'flex': sinks need lse, which FlexAttention does not give on a CPU")
    if (
        not has_lse
        and torch.is_grad_enabled()
        and any(x.requires_grad for x in (q, k, v, k_prefix, v_prefix))
    ):
        raise ValueError("impl = 'flex': FlexAttention has no backward on a CPU; use impl = 'cpu'")
    if not q.numel():
        return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)

    def rule(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        n, slot = row // Lq, row % Lq + (Lk - Lq)
        start, end = prefix_start[b, n], prefix_end[b, n]
        prefix = (key < T) & (key >= start) & (key < end)
        key_slot = (key - T) % Lk
        block = (key >= T) & ((key - T) // Lk == n)
        if own == "causal":
            block = block & (key_slot <= slot)
        if window is not None:
            prefix, block = prefix & (end + slot - key < window), block & (slot - key_slot < window)
        return prefix | block

    def cap(score: Tensor, b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    make_mask, attend = _compiled(q.device.type)
    block_mask = make_mask(rule, B, None, N * Lq, T + N * Lk, device=q.device.type)
    rows = q.flatten(1, 2).transpose(1, 2)  # [B, Hq, N * Lq, D]
    keys, values = (
        torch.cat([prefix, x.flatten(1, 2)], dim=1).transpose(1, 2)
        for prefix, x in ((k_prefix, k), (v_prefix, v))
    )
    options = {"score_mod": None if softcap is None else cap, "block_mask": block_mask, "scale": scale}
    if not has_lse:
        rows, keys, values = (
            x.detach() for x in (rows, keys, values)
        )  # else torch refuses them, even under no_grad
        out = attend(rows, keys, values, enable_gqa=True, **options)
        return out.transpose(1, 2).reshape(q.shape), q.new_full(q.shape[:-1], torch.nan, dtype=torch.float32)
    out, aux = attend(rows, keys, values, enable_gqa=True, return_aux=AuxRequest(lse=True), **options)
    out, lse = out.transpose(1, 2).reshape(q.shape), aux.lse.transpose(1, 2).reshape(q.shape[:-1])
    if sinks is not None:
        with_sink = torch.logaddexp(lse, sinks.to(lse.dtype).expand_as(lse))
        out, lse = (out * (lse - with_sink).exp()[..., None]).to(q.dtype), with_sink
    return out, lse
