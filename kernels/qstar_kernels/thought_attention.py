"""The public operator: its contract, and the choice of an implementation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qstar_kernels.cpu_attention import cpu_attention
from qstar_kernels.operands import Operands
from qstar_kernels.reference import reference


# Imported when first called: Triton may be missing, and FlexAttention is slow to import. By import
# statements, which torch.compile can follow.
def _triton(operands: Operands) -> tuple[Tensor, Tensor]:
    from qstar_kernels.triton_attention import triton_attention

    return triton_attention(operands)


def _flash(operands: Operands) -> tuple[Tensor, Tensor]:
    from qstar_kernels.flash import flash

    return flash(operands)


def _flex(operands: Operands) -> tuple[Tensor, Tensor]:
    from qstar_kernels.flex import flex

    return flex(operands)


IMPLEMENTATIONS: dict[str, Callable[[Operands], tuple[Tensor, Tensor]]] = {
    "reference": reference,
    "cpu": cpu_attention,
    "triton": _triton,
    "flash": _flash,
    "flex": _flex,
}


def resolve_impl(
    impl: str, device: torch.device | str, dtype: torch.dtype | None = None, D: int | None = None
) -> str:
    """Name the implementation that runs for `impl` on a device. Raises ValueError where it cannot run.

    "auto" takes cpu on a CPU. On a GPU it takes triton for heads 64, 80, 96, 128 or 256 wide in bf16, fp16 or
    fp32, and reference for all else. flash and flex run only when named.
    """
    kind = torch.device(device).type
    if impl == "auto":
        if kind == "cpu":
            return "cpu"
        return "reference" if _unsupported_reason("triton", device, dtype, D) else "triton"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl = {impl!r}: must be 'auto' or one of {sorted(IMPLEMENTATIONS)}")
    if impl == "cpu" and kind != "cpu":
        raise ValueError(f"impl = 'cpu': the tensors are on {kind}")
    if impl in ("triton", "flash", "flex") and (reason := _unsupported_reason(impl, device, dtype, D)):
        raise ValueError(f"impl = {impl!r}: {reason}")
    return impl


def _unsupported_reason(
    impl: str, device: torch.device | str, dtype: torch.dtype | None, D: int | None
) -> str | None:
    try:
        if impl == "triton":
            from qstar_kernels.triton_attention import unsupported_reason
        elif impl == "flash":
            from qstar_kernels.flash import unsupported_reason
        else:
            from qstar_kernels.flex import unsupported_reason
    except ImportError as error:
        return f"{error.name or error} is not installed"
    return unsupported_reason(device, dtype, D)


def thought_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    prefix_end: Tensor,
    *,
    prefix_start: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    own: str = "causal",
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend from blocks of slots, each to its own range of a shared prefix and to its own earlier slots.

    out[b, n, i, h] = softmax([q.k_prefix[s:e] ; q.k[n, 0..slot(i)]]) [v_prefix[s:e] ; v[n, 0..slot(i)]], with
    s, e = prefix_start[b, n], prefix_end[b, n]; the queries are the last Lq of the block's Lk slots.

    Args:
        q: [B, N, Lq, Hq, D].
        k, v: [B, N, Lk, Hkv, D]; Lq <= Lk, and Hq is a multiple of Hkv (grouped queries).
        k_prefix, v_prefix: [B, T, Hkv, D], like q, k and v in fp64, fp32, bf16 or fp16, all of one dtype.
        prefix_end: [B, N] int32 or int64. A padded block has prefix_start = prefix_end.
        prefix_start: the same, None for 0; 0 <= prefix_start <= prefix_end <= T. Values outside that range
            raise on a CPU; on a GPU they are not checked, because checking would synchronise.
        scale: factor of q.k, by default D ** -0.5.
        softcap: scores become softcap * tanh(score / softcap).
        window: a key is seen when query position - key position < window; slot s is at prefix_end + s.
        sinks: [Hq], one more logit in the denominator of each softmax.
        own: "causal", or "full" when a query sees all Lk own slots.
        impl: "auto" (see `resolve_impl`), "cpu", "triton", "flash" (regular blocks without softcap and
            window: see flash.py), "flex" (FlexAttention; on a CPU forward only, and lse is NaN) or
            "reference" (the dense mask).

    Returns:
        out like q, and lse [B, N, Lq, Hq], natural logarithm, fp32 (fp64 for fp64). Gradients flow through
        both.

    Raises:
        ValueError: an argument is wrong; the message has its name, its value and what is allowed.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    operands = Operands(
        q, k, v, k_prefix, v_prefix, prefix_end, prefix_start, sinks, scale, softcap, window, own
    )
    operands.check()
    name = resolve_impl(impl, q.device, q.dtype, q.shape[-1])
    if name == "cpu":  # it checks the ranges itself, and needs no zeros to start from
        return cpu_attention(operands)
    operands.check_ranges()
    return IMPLEMENTATIONS[name](operands.with_start())
