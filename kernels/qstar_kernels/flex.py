"""Thought attention by torch's FlexAttention, under a block mask of position-major rows.

It runs only when named, as a baseline: it compiles for seconds when a shape is new. On a CPU torch has its
forward pass alone: no gradient, lse is NaN, and sinks, which need lse, raise.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from qstar_kernels.operands import Operands


@functools.cache
def _compiled(device: str):
    if device == "cpu":
        # Inductor's C++ for the mask, and for attention of changing shapes, does not always compile: the mask
        # is made as a dense one first
        return create_block_mask, torch.compile(flex_attention, dynamic=False)
    # not compiled, the first would hold the dense mask and the second all scores
    return torch.compile(create_block_mask), torch.compile(flex_attention)


def _gives_lse(q: Tensor) -> bool:
    return q.is_cuda


def unsupported_reason(
    device: torch.device | str, dtype: torch.dtype | None = None, D: int | None = None
) -> str | None:
    """Say why FlexAttention cannot run on such operands, or None when it can; None is not checked."""
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        return f"the tensors are on {kind}; supported are cpu and cuda"
    if dtype == torch.float64:
        return "q.dtype is torch.float64, supported are fp32, bf16 and fp16"
    if D is not None and D < 16:
        return f"heads are {D} wide, at least 16 are needed"
    return None


def flex(operands: Operands) -> tuple[Tensor, Tensor]:
    """Compute `thought_attention`. Raises ValueError for a gradient or sinks on a CPU."""
    q, k, v, k_prefix, v_prefix, prefix_end, prefix_start, sinks, scale, softcap, window, own = (
        operands.flat()
    )
    B, N, Lq, Lk, T = operands.B, operands.N, operands.Lq, operands.Lk, operands.T
    has_lse = _gives_lse(q)
    if not has_lse:
        if sinks is not None:
            raise ValueError("impl = 'flex': sinks need lse, which FlexAttention does not give on a CPU")
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, k_prefix, v_prefix)):
            raise ValueError("impl = 'flex': FlexAttention has no backward on a CPU; use impl = 'cpu'")
    if not q.numel():
        return operands.empty_results()

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
        # torch refuses leaves that want a gradient, even under no_grad
        rows, keys, values = (x.detach() for x in (rows, keys, values))
        out = attend(rows, keys, values, enable_gqa=True, **options)
        return out.transpose(1, 2).reshape(q.shape), q.new_full(q.shape[:-1], torch.nan, dtype=torch.float32)
    out, aux = attend(rows, keys, values, enable_gqa=True, return_aux=AuxRequest(lse=True), **options)
    out, lse = out.transpose(1, 2).reshape(q.shape), aux.lse.transpose(1, 2).reshape(q.shape[:-1])
    if sinks is not None:
        with_sink = torch.logaddexp(lse, sinks.to(lse.dtype).expand_as(lse))
        out, lse = (out * (lse - with_sink).exp()[..., None]).to(q.dtype), with_sink
    return out, lse
