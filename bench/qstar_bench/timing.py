"""Time every measurement."""

import functools
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from qstar_bench.torch_internals import RANGE_ENTER, RANGE_EXIT, TorchDispatchMode, keep_busy

_Result = TypeVar("_Result")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AHEAD_CYCLES = 10_000_000  # some 5 ms, in which a call's launches queue up
CACHE_BYTES = 256 << 20  # more than any GPU's last cache holds
EMULATED_FLOPS = 2e9  # a core with instructions for a dtype does 20e9 or more


def timed(run: Callable[[], _Result], device: str) -> tuple[float, _Result]:
    """Give the wall-clock seconds of one call, device included, and what it returned."""
    if device != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def kernel_seconds(run: Callable[[], object], device: str) -> float:
    """Measure the seconds of one call's work. On a GPU: between two events on it, its caches flushed, the
    launches queued while it is kept busy, so that Python's own time is no part of it; on a CPU the wall-clock
    time."""
    if device == "cpu":
        return timed(run, device)[0]
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    _cache_filler().zero_()
    keep_busy(AHEAD_CYCLES)
    began.record()
    run()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1e3


@functools.cache
def _cache_filler() -> Tensor:
    return torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")


class SquareProduct:
    """A large square matrix product of random numbers: the ceiling that any model on this machine is held
    against. n is 2,048 on a CPU, but 256 where that has no instructions for dtype and would take minutes, and
    8,192 on a GPU; flops: of one product."""

    def __init__(self, dtype: torch.dtype, device: str, n: int | None = None):
        if n is None:
            n = 8192 if device != "cpu" else 256 if _emulated(dtype) else 2048
        self.name = f"{n} x {n} x {n} in {str(dtype).removeprefix('torch.')}"
        self.flops = 2.0 * n**3
        self.a, self.b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))

    def run(self) -> Tensor:
        return self.a @ self.b


def _emulated(dtype: torch.dtype) -> bool:
    small = SquareProduct(dtype, "cpu", 256)
    return small.flops / min(timed(small.run, "cpu")[0] for _ in range(3)) < EMULATED_FLOPS


def matmul_flops(dtype: torch.dtype, device: str) -> float:
    """Measure the FLOP/s of a `SquareProduct`, the best of a few."""
    product = SquareProduct(dtype, device)
    times = [kernel_seconds(product.run, device) for _ in range(6)]
    return product.flops / min(times[1:])


class PhaseClock(TorchDispatchMode):
    """Time each outermost named range "qstar.X" that runs inside, by X, the device waited for at its
    borders; and "other", the rest. Looks at every operator, so what it times is a step of its own."""

    def __init__(self, device: str):
        super().__init__()
        self.device = device
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []

    def __enter__(self):
        self._entered = self._now()
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self.seconds["other"] = self._now() - self._entered - sum(self.seconds.values())

    def _now(self) -> float:
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is RANGE_ENTER:
            self._open.append(args[0])
            if self._outermost():
                self._began = self._now()
        elif operator is RANGE_EXIT:
            if self._outermost():
                name = self._open[-1].removeprefix("qstar.")
                self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - self._began
            self._open.pop()
        return operator(*args, **(kwargs or {}))

    def _outermost(self) -> bool:
        """Tell whether the range entered last is one of ours, and no other of ours is around it."""
        ours = [name.startswith("qstar.") for name in self._open]
        return ours[-1] and sum(ours) == 1
