"""What the operator's arguments must be; see `thought_attention` for their meaning."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INDICES = (torch.int32, torch.int64)


def _require(holds: bool, name: str, found: object, allowed: object) -> None:
    if not holds:
        found = tuple(found) if isinstance(found, torch.Size) else found
        raise ValueError(f"{name} = {found}: must be {allowed}")


def check_operands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    prefix_end: Tensor,
    prefix_start: Tensor | None,
    softcap: float | None,
    window: int | None,
    sinks: Tensor | None,
    own: str,
) -> None:
    """What can be told without reading a tensor: shapes, devices, dtypes, options. Raises ValueError.

    It precedes every call of a sampling loop, so it runs none of torch's operators.
    """
    _require(q.ndim == 5, "q.shape", q.shape, "[B, N, Lq, Hq, D]")
    _require(k.ndim == 5, "k.shape", k.shape, "[B, N, Lk, Hkv, D]")
    _require(k_prefix.ndim == 4, "k_prefix.shape", k_prefix.shape, "[B, T, Hkv, D]")
    B, N, Lq, Hq, D = q.shape
    Lk, H, T = k.shape[2], k.shape[3], k_prefix.shape[1]
    device, dtype = q.device, q.dtype
    if dtype not in DTYPES:
        _require(False, "q.dtype", dtype, f"one of {DTYPES}")
    own_shape, prefix_shape, ranges = (B, N, Lk, H, D), (B, T, H, D), (B, N)
    named: tuple[tuple[str, Tensor | None, tuple, tuple | None], ...] = (
        ("k", k, own_shape, None),
        ("v", v, own_shape, None),
        ("k_prefix", k_prefix, prefix_shape, None),
        ("v_prefix", v_prefix, prefix_shape, None),
        ("prefix_end", prefix_end, ranges, INDICES),
        ("prefix_start", prefix_start, ranges, INDICES),
        ("sinks", sinks, (Hq,), DTYPES),
    )
    for name, x, shape, allowed in named:
        if x is None:
            continue
        if x.shape != shape:
            _require(False, f"{name}.shape", x.shape, shape)
        if x.device != device:
            _require(False, f"{name}.device", x.device, f"that of q, {device}")
        if allowed is None and x.dtype != dtype:
            _require(False, f"{name}.dtype", x.dtype, f"that of q, {dtype}")
        if allowed is not None and x.dtype not in allowed:
            _require(False, f"{name}.dtype", x.dtype, f"one of {allowed}")
    _require(H > 0 and Hq % H == 0, "q.shape[3]", Hq, f"a multiple of the {H} key-value heads")
    _require(1 <= Lq <= Lk, "q.shape[2]", Lq, f"in [1, {Lk}], the block's slots")
    _require(softcap is None or softcap > 0, "softcap", softcap, "positive or None")
    _require(window is None or window > 0, "window", window, "positive or None")
    _require(own in ("causal", "full"), "own", repr(own), "'causal' or 'full'")


def check_ranges(prefix_end: Tensor, prefix_start: Tensor | None, T: int) -> None:
    """0 <= prefix_start <= prefix_end <= T, where that can be read at once: on a CPU, of real tensors, when
    nothing is being compiled. Raises ValueError."""
    if prefix_end.device.type != "cpu" or not prefix_end.numel() or torch.compiler.is_compiling():
        return
    if detect_fake_mode(prefix_end) is not None:
        return
    least, most = map(int, torch.aminmax(prefix_end))
    _require(most <= T, "prefix_end", most, f"at most {T} prefix keys")
    if prefix_start is None:
        _require(least >= 0, "prefix_end", least, "at least 0")
        return
    first = int(prefix_start.min())
    _require(first >= 0, "prefix_start", first, "at least 0")
    lengths = (prefix_end - prefix_start).flatten()
    if int(lengths.min()) < 0:
        worst = lengths.argmin()
        start, end = int(prefix_start.flatten()[worst]), int(prefix_end.flatten()[worst])
        _require(False, "prefix_end", end, f"at least prefix_start = {start}")
