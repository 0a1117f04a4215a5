"""Thought attention of regular blocks by stock flash kernels: the prefix by torch's operator, the own slots
by the Triton kernels.

R blocks at each of the tokens 1 .. P: with the slots of a token's blocks folded into the query heads of their
group, the prefix part is square causal attention, and the log-sum-exps merge it with the own slots exactly.
The backward calls torch's flash backward with the global out and lse, which makes each part's gradient exact
(merging in autograd would drop the gradient of lse). torch's operator is flash-attention 2, or what
`torch.nn.attention.activate_flash_attention_impl` put in its place. It runs only when named: it reads whether
the blocks are regular, which waits for the GPU, and folding copies q. Legend as in cpu_tiles.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from qstar_kernels import triton_attention
from qstar_kernels.operands import Operands, last_contiguous

WIDEST = 256  # head width that the flash kernels take


def unsupported_reason(
    device: torch.device | str, dtype: torch.dtype | None = None, D: int | None = None
) -> str | None:
    """Say why it cannot run on such operands, or None when it can; None is not checked."""
    if torch.device(device).type == "cuda" and dtype not in (None, torch.bfloat16, torch.float16):
        return f"q.dtype is {dtype}, supported are bf16 and fp16"
    return triton_attention.unsupported_reason(device, dtype, D)


def thoughts_at_each_token(prefix_start: Tensor, prefix_end: Tensor, T: int) -> int | None:
    """Return R when every row has R blocks at each of the tokens 1 .. N / R that see all before, or padding
    that sees nothing; else None. Waits for the GPU."""
    N = prefix_end.shape[1]
    if not prefix_end.numel() or bool(prefix_start.any()):
        return None
    R = int((prefix_end == 1).sum(1).max())
    if R == 0 or N % R or N // R > T:
        return None
    regular = torch.arange(1, N // R + 1, device=prefix_end.device).repeat_interleave(R)
    return R if bool(((prefix_end == regular) | (prefix_end == 0)).all()) else None


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, tuple]:
    """Attend causally from q [B, Hq, P, D] to k, v [B, H, P, D]: out, lse [B, Hq, P], and what the backward
    wants."""
    if q.is_cuda:
        out, lse, *rest = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, True, False, scale=scale
        )
        return out, lse, tuple(rest[:6])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
    return out, lse, ()


def _flash_backward(d_out, q, k, v, out, lse, rest, scale) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dq, dk, dv of that call for any out and lse: also for the global ones."""
    if q.is_cuda:
        cum_q, cum_k, max_q, max_k, seed, offset = rest
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            d_out, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, 0.0, True, seed, offset, scale=scale
        )
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        d_out, q, k, v, out, lse, 0.0, True, scale=scale
    )


def _fold(x: Tensor, R: int, H: int) -> Tensor:
    """Reorder [B, P * R, Lq, H * G, ...] as [B, H * (R * Lq * G), P, ...]."""
    x = x.unflatten(1, (-1, R)).unflatten(4, (H, -1))  # [B, P, R, Lq, H, G, ...]
    return x.permute(0, 4, 2, 3, 5, 1, *range(6, x.ndim)).flatten(1, 4)


def _unfold(x: Tensor, like: Tensor, R: int, H: int) -> Tensor:
    """Undo `_fold`; `like` has the shape of the result up to its heads."""
    Lq, Hq = like.shape[2:4]
    x = x.unflatten(1, (H, R, Lq, Hq // H))  # [B, H, R, Lq, G, P, ...]
    return x.permute(0, 5, 2, 3, 1, 4, *range(6, x.ndim)).flatten(4, 5).flatten(1, 2)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, R: int, *flat):
        operands = Operands(*flat)
        q, k_prefix, v_prefix, scale = operands.q, operands.k_prefix, operands.v_prefix, operands.scale
        H, P = operands.Hkv, operands.N // R
        keys, values = (x[:, :P].transpose(1, 2) for x in (k_prefix, v_prefix))
        part, part_lse, ctx.rest = _flash(_fold(q, R, H), keys, values, scale)
        part, part_lse = _unfold(part, q, R, H), _unfold(part_lse, q, R, H)
        padding = operands.prefix_end == 0
        part_lse = part_lse.masked_fill(padding[..., None, None], -torch.inf)
        # without a prefix the Triton kernels compute the own part
        empty, nothing = k_prefix[:, :0].contiguous(), torch.zeros_like(operands.prefix_end)
        ctx.own = replace(operands, k_prefix=empty, v_prefix=empty, prefix_end=nothing).flat()[3:]
        own_out, own_lse = triton_attention._forward_op(*flat[:3], *ctx.own)
        lse = torch.logaddexp(part_lse, own_lse)
        out = part * (part_lse - lse).exp()[..., None] + own_out * (own_lse - lse).exp()[..., None]
        out = out.to(q.dtype)
        ctx.save_for_backward(*flat[:5], out, lse, padding)
        ctx.scale, ctx.R, ctx.has_sinks = scale, R, operands.sinks is not None
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out, d_lse):
        q, k, v, k_prefix, v_prefix, out, lse, padding = ctx.saved_tensors
        H, R, D = k.shape[3], ctx.R, q.shape[-1]
        d_out = torch.zeros_like(out) if d_out is None else d_out
        own_d_lse = torch.zeros_like(lse) if d_lse is None else d_lse
        dq, dk, dv, _, _, d_sinks = triton_attention._backward_op(
            d_out, own_d_lse, out, lse, q, k, v, *ctx.own
        )
        tensors = [q, k_prefix[:, : q.shape[1] // R], v_prefix[:, : q.shape[1] // R], d_out, out]
        if d_lse is not None:
            # dS = P (dP - delta + d_lse): one more column in v, of ones, and d_lse in d_out, adds it to dP
            if D + 8 > WIDEST:
                raise ValueError(f"impl = 'flash': a gradient of lse needs heads at most {WIDEST - 8} wide")
            tensors = [pad(x, (0, 8)) for x in tensors]
            tensors[2][..., D] = 1
            tensors[3][..., D] = d_lse
        hidden = padding[..., None, None]
        folded_lse = _fold(lse.masked_fill(hidden, torch.inf), R, H)  # padding: every probability is 0
        queries, d_outs, outs = (_fold(x, R, H) for x in (tensors[0], tensors[3], tensors[4]))
        keys, values = (x.transpose(1, 2) for x in tensors[1:3])
        part, *of_prefix = _flash_backward(
            d_outs, queries, keys, values, outs, folded_lse, ctx.rest, ctx.scale
        )
        dq = dq + _unfold(part, q, R, H)[..., :D]
        rest = k_prefix.shape[1] - keys.shape[2]
        dk_prefix, dv_prefix = (pad(x.transpose(1, 2)[..., :D], (0, 0, 0, 0, 0, rest)) for x in of_prefix)
        d_sinks = d_sinks if ctx.has_sinks else None
        return None, dq, dk, dv, dk_prefix, dv_prefix, None, None, d_sinks, *[None] * 4


def flash(operands: Operands) -> tuple[Tensor, Tensor]:
    """Compute `thought_attention`. prefix_start must not be None.

    Raises ValueError for irregular blocks, softcap, window, and a scale that is not positive.
    """
    for name in ("softcap", "window"):
        if (value := getattr(operands, name)) is not None:
            raise ValueError(f"impl = 'flash': {name} = {value}: must be None; use impl = 'triton'")
    if operands.scale <= 0:
        raise ValueError(f"impl = 'flash': scale = {operands.scale}: must be positive")
    assert operands.prefix_start is not None
    R = thoughts_at_each_token(operands.prefix_start, operands.prefix_end, operands.T)
    if R is None:
        raise ValueError(
            "impl = 'flash': the blocks are not R at each of the tokens 1, 2, ...; use impl = 'triton'"
        )
    q, k, v, k_prefix, v_prefix, *rest = operands.flat()
    return _Flash.apply(R, *map(last_contiguous, (q, k, v, k_prefix, v_prefix)), *rest)
