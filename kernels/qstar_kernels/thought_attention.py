"""The public operator: its contract, and the choice of an implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qstar_kernels.checks import check_operands, check_ranges
from qstar_kernels.cpu_attention import cpu_attention
from qstar_kernels.reference import reference


# Imported when first called: Triton may be missing, and FlexAttention is slow to import. By import
# statements, which torch.compile can follow.
def _triton(*arguments: Any) -> tuple[Tensor, Tensor]:
    from qstar_kernels.triton_attention import triton_attention

    return triton_attention(*arguments)


def _flash(*arguments: Any) -> tuple[Tensor, Tensor]:
    from qstar_kernels.flash import flash

    return flash(*arguments)


def _flex(*arguments: Any) -> tuple[Tensor, Tensor]:
    from qstar_kernels.flex import flex

    return flex(*arguments)


IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": reference,
    "cpu": cpu_attention,
    "triton": _triton,
    "flash": _flash,
    "flex": _flex,
}


def resolve_impl(
    impl: str, device: torch.device | str, dtype: torch.dtype | None = None, D: int | None = None
) -> str:
    """The name of the implementation that runs for `impl` on a device. Raises ValueError when it cannot.

    "auto" takes cpu on a CPU; on a GPU triton for heads 64, 80, 96, 128 or 256 wide in bf16, fp16 or fp32,
    and reference for all else. flash and flex are taken only by name.
    """
    kind = torch.device(device).type
    if impl == "auto":
        if kind == "cpu":
            return "cpu"
        return "reference" if _why_not("triton", device, dtype, D) else "triton"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl = {impl!r}: must be 'auto' or one of {sorted(IMPLEMENTATIONS)}")
    if impl == "cpu" and kind != "cpu":
        raise ValueError(f"impl = 'cpu': the tensors are on {kind}")
    if impl in ("triton", "flash", "flex") and (reason := _why_not(impl, device, dtype, D)):
        raise ValueError(f"impl = {impl!r}: {reason}")
    return impl


def _why_not(impl: str, device: torch.device | str, dtype: torch.dtype | None, D: int | None) -> str | None:
    try:
        if impl == "triton":
            from qstar_kernels.triton_attention import why_not
        elif impl == "flash":
            from qstar_kernels.flash import why_not
        else:
            from qstar_kernels.flex import why_not
    except ImportError as error:
        return f"{error.name or error} is not installed"
    return why_not(device, dtype, D)


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
    """Blocks of slots, each attending to its own range of a shared prefix and to its own earlier slots.

    out[b, n, i, h] = softmax([q.k_prefix[s:e] ; q.k[n, 0..slot(i)]]) [v_prefix[s:e] ; v[n, 0..slot(i)]], with
    s, e = prefix_start[b, n], prefix_end[b, n]; the queries are the last Lq of the block's Lk slots.

    Args:
        q: [B, N, Lq, Hq, D]; k, v: [B, N, Lk, Hkv, D], Lq <= Lk, Hq a multiple of Hkv (grouped queries).
        k_prefix, v_prefix: [B, T, Hkv, D]. All of one dtype: fp64, fp32, bf16 or fp16.
        prefix_end, prefix_start: [B, N] int32 or int64, 0 <= start <= end <= T (start None: 0). A padded
            block has start = end. Out-of-range values raise on a CPU; on a GPU, which would have to be
            waited for, they are not looked at.
        scale: of q.k, default D ** -0.5. softcap: scores become softcap * tanh(score / softcap).
        window: a key is seen when query position - key position < window, slot s being at prefix_end + s.
        sinks: [Hq], one more logit in each softmax's denominator. own: "causal", or "full": all Lk own slots.
        impl: "auto" (see `resolve_impl`), "cpu", "triton", "flash" (regular blocks, no softcap or window: see
            flash.py), "flex" (FlexAttention; forward only on a CPU, where lse is NaN) or "reference" (the
            dense mask).

    Returns:
        out like q, and lse [B, N, Lq, Hq], natural logarithm, fp32 (fp64 for fp64). Gradients flow through
        both.

    Raises:
        ValueError, naming the argument, its value and what is allowed.
    """
    check_operands(q, k, v, k_prefix, v_prefix, prefix_end, prefix_start, softcap, window, sinks, own)
    name = resolve_impl(impl, q.device, q.dtype, q.shape[-1])
    if name != "cpu":  # it looks at the ranges itself, and needs no zeros to start from
        check_ranges(prefix_end, prefix_start, k_prefix.shape[1])
        if prefix_start is None:
            prefix_start = torch.zeros_like(prefix_end)
    if k_prefix.shape[1] == 0 and k_prefix.stride() != k_prefix.contiguous().stride():
        k_prefix, v_prefix = k_prefix.contiguous(), v_prefix.contiguous()
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return IMPLEMENTATIONS[name](
        q, k, v, k_prefix, v_prefix, prefix_end, prefix_start, scale, softcap, window, sinks, own
    )
