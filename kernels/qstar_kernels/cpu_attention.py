"""Thought attention by the CPU engine, as torch operators: qstar::thought_attention_cpu, its backward, and
qstar::thought_attention_cpu_no_grad.

All are opaque to torch.compile and have fake versions, as those of triton_attention.py. They compute in fp32
(fp64 for fp64) whatever the dtype of the operands, under autocast too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qstar_kernels import cpu_native, cpu_tiles
from qstar_kernels.operands import SCHEMA, Operands

FORWARD_SCHEMA = f"({SCHEMA}) -> (Tensor, Tensor)"
BACKWARD_SCHEMA = f"(Tensor d_out, Tensor d_lse, {SCHEMA}) -> ({', '.join(['Tensor'] * 6)})"


def _forward(*flat) -> tuple[Tensor, Tensor]:
    """Compute out and lse by the C kernel where it takes the operands, else in tiles."""
    operands = Operands(*flat)
    if cpu_native.supports(operands.q, operands.k):
        results = cpu_native.forward(operands)
        if results is not None:
            return results
    operands.check_ranges()
    with torch.autocast("cpu", enabled=False):
        return cpu_tiles.forward(operands)


_forward_op = torch.library.custom_op(
    "qstar::thought_attention_cpu", _forward, mutates_args=(), schema=FORWARD_SCHEMA
)
# The same without a gradient, and without the Python that torch runs around a custom operator: in a sampling
# loop it costs a third of the kernel's own time.
torch.library.define("qstar::thought_attention_cpu_no_grad", FORWARD_SCHEMA)
torch.library.impl("qstar::thought_attention_cpu_no_grad", "CPU", _forward)
_forward_no_grad = torch.ops.qstar.thought_attention_cpu_no_grad.default


@torch.library.register_fake("qstar::thought_attention_cpu_no_grad")
@_forward_op.register_fake
def _(*flat):
    return Operands(*flat).empty_results()


@torch.library.custom_op("qstar::thought_attention_cpu_backward", mutates_args=(), schema=BACKWARD_SCHEMA)
def _backward_op(d_out, d_lse, *flat):
    """Return (dq, dk, dv, dk_prefix, dv_prefix, dsinks); dsinks is empty without sinks."""
    with torch.autocast("cpu", enabled=False):
        *gradients, d_sinks = cpu_tiles.backward(d_out, d_lse, Operands(*flat))
    return (*gradients, d_lse.new_empty(0) if d_sinks is None else d_sinks)


@_backward_op.register_fake
def _(d_out, d_lse, *flat):
    operands = Operands(*flat)
    sinks = operands.sinks
    d_sinks = d_lse.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return (*operands.empty_gradients(), d_sinks)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.options = inputs[8:]


def _gradients(ctx, d_out: Tensor, d_lse: Tensor):
    saved = ctx.saved_tensors  # once: activation checkpointing refuses a second look
    *gradients, d_sinks = _backward_op(d_out, d_lse, *saved, *ctx.options)
    return (*gradients, None, None, None if saved[-1] is None else d_sinks, None, None, None, None)


_forward_op.register_autograd(_gradients, setup_context=_save)


def cpu_attention(operands: Operands) -> tuple[Tensor, Tensor]:
    """Compute `thought_attention` on a CPU. Raises ValueError for a range outside the prefix."""
    operator = _forward_op if torch.is_grad_enabled() else _forward_no_grad
    return operator(*operands.flat())
