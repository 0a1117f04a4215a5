"""Peak memory of a call, from torch's allocators: on a GPU their own peak, on a CPU their log."""

from __future__ import annotations

import resource
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """Bytes that one call holds at most beside what was there before: its results included."""
    if device == "cpu":
        return _cpu_peak_bytes(run)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = run()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def resident_peak_bytes() -> int:
    """The most memory that this process has held so far, libraries included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux


def _cpu_peak_bytes(run: Callable[[], object]) -> int:
    """Every allocation and release of torch's CPU allocator, inside operators and custom ones too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        kept = run()
    del kept
    changes = [event for event in log.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak
