"""Thought attention by the CPU engine, as two torch operators: qstar::thought_attention_cpu and its backward.

Both are opaque to torch.compile and have fake versions, as those of triton_attention.py. They compute in fp32
(fp64 for fp64) whatever the dtype of the operands, under autocast too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qstar_kernels import cpu as engine


@torch.library.custom_op("qstar::thought_attention_cpu", mutates_args=())
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    prefix_end: Tensor,
    prefix_start: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    own: str,
) -> tuple[Tensor, Tensor]:
    options = engine.Options(scale, softcap, window, own)
    with torch.autocast("cpu", enabled=False):
        return engine.forward(q, k, v, k_prefix, v_prefix, prefix_end, prefix_start, sinks, options)


@_forward_op.register_fake
def _(q, k, v, k_prefix, v_prefix, prefix_end, prefix_start, sinks, scale, softcap, window, own):
    high = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=high)


@torch.library.custom_op("qstar::thought_attention_cpu_backward", mutates_args=())
def _backward_op(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    prefix_end: Tensor,
    prefix_start: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    own: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dk_prefix, dv_prefix, dsinks); dsinks is empty without sinks."""
    options = engine.Options(scale, softcap, window, own)
    with torch.autocast("cpu", enabled=False):
        dq, dk, dv, dk_prefix, dv_prefix, d_sinks = engine.backward(
            d_out, d_lse, q, k, v, k_prefix, v_prefix, prefix_end, prefix_start, sinks, options
        )
    return dq, dk, dv, dk_prefix, dv_prefix, d_lse.new_empty(0) if d_sinks is None else d_sinks


@_backward_op.register_fake
def _(
    d_out, d_lse, q, k, v, k_prefix, v_prefix, prefix_end, prefix_start, sinks, scale, softcap, window, own
):  # fmt: skip
    like = [x.new_empty(x.shape) for x in (q, k, v, k_prefix, v_prefix)]
    return (*like, d_lse.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape))


def _save(ctx, inputs, output) -> None:
    *tensors, scale, softcap, window, own = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = scale, softcap, window, own


def _gradients(ctx, d_out: Tensor, d_lse: Tensor):
    saved = ctx.saved_tensors  # once: activation checkpointing refuses a second look
    *gradients, d_sinks = _backward_op(d_out, d_lse, *saved, *ctx.options)
    return (*gradients, None, None, None if saved[-1] is None else d_sinks, None, None, None, None)


_forward_op.register_autograd(_gradients, setup_context=_save)


def cpu_attention(
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
    return _forward_op(
        q, k, v, k_prefix, v_prefix, prefix_end, prefix_start, sinks, scale, softcap, window, own
    )
