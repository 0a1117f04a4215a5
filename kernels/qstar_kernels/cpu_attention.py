"""Thought attention by the CPU engine, as torch operators: qstar::thought_attention_cpu, its backward, and
qstar::thought_attention_cpu_no_grad.

All are opaque to torch.compile and have fake versions, as those of triton_attention.py. They compute in fp32
(fp64 for fp64) whatever the dtype of the operands, under autocast too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qstar_kernels import cpu_tiles as engine


@torch.library.custom_op("qstar::thought_attention_cpu", mutates_args=())
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    prefix_end: Tensor,
    prefix_start: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    own: str,
) -> tuple[Tensor, Tensor]:
    return engine.forward(
        q, k, v, k_prefix, v_prefix, prefix_end, prefix_start, sinks, scale, softcap, window, own
    )


# The same without a gradient, and without the Python that torch runs around a custom operator: in a sampling
# loop it costs a third of the kernel's own time.
_SCHEMA = torch.library.infer_schema(engine.forward, mutates_args=())
torch.library.define("qstar::thought_attention_cpu_no_grad", _SCHEMA)
torch.library.impl("qstar::thought_attention_cpu_no_grad", "CPU", engine.forward)
_forward_no_grad = torch.ops.qstar.thought_attention_cpu_no_grad.default


@torch.library.register_fake("qstar::thought_attention_cpu_no_grad")
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
    prefix_start: Tensor | None,
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
    prefix_start: Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: Tensor | None,
    own: str,
) -> tuple[Tensor, Tensor]:
    """See `thought_attention`."""
    operator = _forward_op if torch.is_grad_enabled() else _forward_no_grad
    return operator(q, k, v, k_prefix, v_prefix, prefix_end, prefix_start, sinks, scale, softcap, window, own)
