"""The operands of thought attention, as the public function hands them to every implementation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INDICES = (torch.int32, torch.int64)

# The fields of Operands as torch.library wants them: `flat` gives them, Operands(*flat) takes them.
SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor k_prefix, Tensor v_prefix, Tensor prefix_end, "
    "Tensor? prefix_start, Tensor? sinks, float scale, float? softcap, SymInt? window, str own"
)


@dataclass(frozen=True)
class Operands:
    """Tensors and options of one call; `thought_attention` says what each means."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_prefix: Tensor
    v_prefix: Tensor
    prefix_end: Tensor
    prefix_start: Tensor | None
    sinks: Tensor | None
    scale: float
    softcap: float | None = None
    window: int | None = None
    own: str = "causal"

    def flat(self) -> tuple[Any, ...]:
        """Return the fields in the order of SCHEMA."""
        return (
            *(self.q, self.k, self.v, self.k_prefix, self.v_prefix, self.prefix_end, self.prefix_start),
            *(self.sinks, self.scale, self.softcap, self.window, self.own),
        )

    @property
    def B(self) -> int:
        return self.q.shape[0]

    @property
    def N(self) -> int:
        return self.q.shape[1]

    @property
    def Lq(self) -> int:
        return self.q.shape[2]

    @property
    def Lk(self) -> int:
        return self.k.shape[2]

    @property
    def T(self) -> int:
        return self.k_prefix.shape[1]

    @property
    def Hq(self) -> int:
        return self.q.shape[3]

    @property
    def Hkv(self) -> int:
        return self.k.shape[3]

    @property
    def G(self) -> int:
        """Query heads of one key-value head."""
        return self.q.shape[3] // self.k.shape[3]

    @property
    def D(self) -> int:
        return self.q.shape[4]

    @property
    def high(self) -> torch.dtype:
        """The dtype of sums and of lse: fp64 for fp64, else fp32."""
        return torch.promote_types(self.q.dtype, torch.float32)

    def empty_results(self) -> tuple[Tensor, Tensor]:
        """Return out [B, N, Lq, Hq, D] and lse [B, N, Lq, Hq], contiguous and not initialised."""
        return self.q.new_empty(self.q.shape), self.q.new_empty(self.q.shape[:-1], dtype=self.high)

    def empty_gradients(self) -> list[Tensor]:
        """Return dq, dk, dv, dk_prefix, dv_prefix, contiguous and not initialised."""
        return [x.new_empty(x.shape) for x in (self.q, self.k, self.v, self.k_prefix, self.v_prefix)]

    def check(self) -> None:
        """Raise ValueError for a wrong shape, device, dtype or option; no value of a tensor is read.

        It precedes every call of a sampling loop, so it runs none of torch's operators.
        """
        q, k = self.q, self.k
        _require(q.ndim == 5, "q.shape", q.shape, "[B, N, Lq, Hq, D]")
        _require(k.ndim == 5, "k.shape", k.shape, "[B, N, Lk, Hkv, D]")
        _require(self.k_prefix.ndim == 4, "k_prefix.shape", self.k_prefix.shape, "[B, T, Hkv, D]")
        B, N, Lq, Hq, D = q.shape
        Lk, H, T = k.shape[2], k.shape[3], self.k_prefix.shape[1]
        device, dtype = q.device, q.dtype
        if dtype not in DTYPES:
            _require(False, "q.dtype", dtype, f"one of {DTYPES}")
        own_shape, prefix_shape, ranges = (B, N, Lk, H, D), (B, T, H, D), (B, N)
        named: tuple[tuple[str, Tensor | None, tuple, tuple | None], ...] = (
            ("k", k, own_shape, None),
            ("v", self.v, own_shape, None),
            ("k_prefix", self.k_prefix, prefix_shape, None),
            ("v_prefix", self.v_prefix, prefix_shape, None),
            ("prefix_end", self.prefix_end, ranges, INDICES),
            ("prefix_start", self.prefix_start, ranges, INDICES),
            ("sinks", self.sinks, (Hq,), DTYPES),
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
        _require(1 <= Lq <= Lk, "q.shape[2]", Lq, f"in [1, {Lk}], the slots of a block")
        _require(self.softcap is None or self.softcap > 0, "softcap", self.softcap, "positive or None")
        _require(self.window is None or self.window > 0, "window", self.window, "positive or None")
        _require(self.own in ("causal", "full"), "own", repr(self.own), "'causal' or 'full'")

    def check_ranges(self) -> None:
        """Raise ValueError unless 0 <= prefix_start <= prefix_end <= T.

        The ranges are read only where that costs nothing: on a CPU, of real tensors, outside a compilation.
        """
        end, start = self.prefix_end, self.prefix_start
        if end.device.type != "cpu" or not end.numel() or torch.compiler.is_compiling():
            return
        if detect_fake_mode(end) is not None:
            return
        least, most = map(int, torch.aminmax(end))
        _require(most <= self.T, "prefix_end", most, f"at most {self.T} prefix keys")
        if start is None:
            _require(least >= 0, "prefix_end", least, "at least 0")
            return
        first = int(start.min())
        _require(first >= 0, "prefix_start", first, "at least 0")
        lengths = (end - start).flatten()
        if int(lengths.min()) < 0:
            i = lengths.argmin()
            _require(
                False, "prefix_end", int(end.flatten()[i]), f"at least prefix_start = {start.flatten()[i]}"
            )

    def with_start(self) -> Operands:
        """Fill in prefix_start where it is None."""
        if self.prefix_start is not None:
            return self
        return replace(self, prefix_start=torch.zeros_like(self.prefix_end))


def _require(holds: bool, name: str, found: object, allowed: object) -> None:
    if not holds:
        found = tuple(found) if isinstance(found, torch.Size) else found
        raise ValueError(f"{name} = {found}: must be {allowed}")


def last_contiguous(x: Tensor) -> Tensor:
    """Return x, or a copy where its last axis is not contiguous."""
    # asked first, not just done: in a sampling loop each call of torch is felt
    return x if x.stride(-1) == 1 else x.contiguous()
