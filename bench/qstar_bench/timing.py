"""The clock of every measurement."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

_Result = TypeVar("_Result")
AHEAD_CYCLES = 10_000_000  # some 5 ms, in which a call's launches queue up
CACHE_BYTES = 256 << 20  # more than any GPU's last cache holds


def timed(run: Callable[[], _Result], device: str) -> tuple[float, _Result]:
    """Wall-clock seconds of one call, the device waited for; and what it returned."""
    if device != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def kernel_seconds(run: Callable[[], object], device: str) -> float:
    """Seconds of one call's work. On a GPU: between two events on it, its caches flushed, the launches queued
    while it is kept busy, so that Python's own time is no part of it; on a CPU the wall-clock time."""
    if device == "cpu":
        return timed(run, device)[0]
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    _cache_filler().zero_()
    torch.cuda._sleep(AHEAD_CYCLES)
    began.record()
    run()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1e3


@functools.cache
def _cache_filler() -> Tensor:
    return torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
