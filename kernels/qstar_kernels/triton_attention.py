"""Thought attention by the Triton kernels, as two torch operators: qstar::thought_attention and its backward.

Both are opaque to torch.compile, have fake versions, and need a GPU; under TRITON_INTERPRET=1 (set before
triton is imported) they run on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qstar_kernels.operands import SCHEMA, Operands
from qstar_kernels.triton_backward_keys import keys_launch, keys_tile_of
from qstar_kernels.triton_backward_queries import delta_launch, rows_launch
from qstar_kernels.triton_common import interpreted
from qstar_kernels.triton_decode import decode_launches
from qstar_kernels.triton_forward import forward_launch, thought_forward
from qstar_kernels.triton_tiles import HEAD_WIDTHS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


FORWARD_SCHEMA = f"({SCHEMA}) -> (Tensor, Tensor)"
BACKWARD_SCHEMA = (
    f"(Tensor d_out, Tensor d_lse, Tensor out, Tensor lse, {SCHEMA}) -> ({', '.join(['Tensor'] * 6)})"
)


@torch.library.custom_op("qstar::thought_attention", mutates_args=(), schema=FORWARD_SCHEMA)
def _forward_op(*flat):
    operands = Operands(*flat)
    out, lse = operands.empty_results()
    if operands.Lq == 1:
        for launch in decode_launches(operands, out, lse):
            launch.run()
    else:
        forward_launch(operands, out, lse).run()
    return out, lse


@_forward_op.register_fake
def _(*flat):
    return Operands(*flat).empty_results()


@torch.library.custom_op("qstar::thought_attention_backward", mutates_args=(), schema=BACKWARD_SCHEMA)
def _backward_op(d_out, d_lse, out, lse, *flat):
    """Return (dq, dk, dv, dk_prefix, dv_prefix, dsinks); dsinks is empty without sinks."""
    operands = Operands(*flat)
    sinks, dtype = operands.sinks, operands.q.dtype
    d_out, delta = d_out.contiguous(), torch.empty_like(lse)
    delta_launch(out, d_out, d_lse.contiguous(), delta).run()
    dq, dk, dv = (x.new_empty(x.shape) for x in (operands.q, operands.k, operands.v))
    rows = rows_launch(operands, d_out, lse, delta, dq, dk, dv)
    rows.run()
    if not rows.tile.WHOLE_BLOCKS:
        tile = keys_tile_of(operands, own_slots=True)
        keys_launch(operands, d_out, lse, delta, dk, dv, own_slots=True, tile=tile).run()
    tile = keys_tile_of(operands, own_slots=False)
    partial = dtype if tile.SPLIT == 1 else lse.dtype
    dk_prefix, dv_prefix = (
        x.new_empty(tile.SPLIT, *x.shape, dtype=partial) for x in (operands.k_prefix, operands.v_prefix)
    )
    keys_launch(operands, d_out, lse, delta, dk_prefix, dv_prefix, own_slots=False, tile=tile).run()
    if tile.SPLIT == 1:
        dk_prefix, dv_prefix = dk_prefix[0], dv_prefix[0]
    else:
        dk_prefix, dv_prefix = (x.sum(0).to(dtype) for x in (dk_prefix, dv_prefix))
    if sinks is None:
        d_sinks = lse.new_empty(0)
    else:
        d_sinks = -((sinks.to(lse.dtype) - lse).exp_() * delta).sum((0, 1, 2)).to(sinks.dtype)
    return dq, dk, dv, dk_prefix, dv_prefix, d_sinks


@_backward_op.register_fake
def _(d_out, d_lse, out, lse, *flat):
    operands = Operands(*flat)
    sinks = operands.sinks
    d_sinks = lse.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return (*operands.empty_gradients(), d_sinks)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output, *inputs[:8])
    ctx.options = inputs[8:]


def _gradients(ctx, d_out: Tensor, d_lse: Tensor):
    saved = ctx.saved_tensors  # once: activation checkpointing refuses a second look
    *gradients, d_sinks = _backward_op(d_out, d_lse, *saved, *ctx.options)
    return (*gradients, None, None, None if saved[-1] is None else d_sinks, None, None, None, None)


_forward_op.register_autograd(_gradients, setup_context=_save)


def unsupported_reason(
    device: torch.device | str, dtype: torch.dtype | None = None, D: int | None = None
) -> str | None:
    """Say why the kernels cannot run on such operands, or None when they can; None is not checked."""
    on_interpreter = interpreted(thought_forward)
    kind = torch.device(device).type
    if kind != "cuda" and not (kind == "cpu" and on_interpreter):
        return f"the tensors are on {kind}; it needs a GPU, or TRITON_INTERPRET=1 for tests on a CPU"
    if on_interpreter and dtype == torch.bfloat16:
        return "Triton's interpreter computes wrong numbers in bfloat16"
    if dtype not in (None, *DTYPES) and not (on_interpreter and dtype == torch.float64):
        return f"q.dtype is {dtype}, supported are {', '.join(str(dtype) for dtype in DTYPES)}"
    if D not in (None, *HEAD_WIDTHS):
        return f"heads are {D} wide, supported are {', '.join(str(D) for D in HEAD_WIDTHS)}"
    return None


def triton_attention(operands: Operands) -> tuple[Tensor, Tensor]:
    """Compute `thought_attention`: products in the operands' dtype, sums in fp32.

    Raises ValueError where the kernels cannot run. prefix_start must not be None.
    """
    reason = unsupported_reason(operands.q.device, operands.q.dtype, operands.D)
    if reason is not None:
        raise ValueError(f"impl = 'triton': {reason}")
    if operands.scale <= 0:  # the kernels take a row's largest product for its largest score
        operands = replace(operands, q=operands.q * operands.scale, scale=1.0)
    return _forward_op(*operands.flat())
