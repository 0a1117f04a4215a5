"""Measure the memory really held: the peak of a call, and of a step by its named phases.

Both come from the log of torch's allocators (kineto's profile_memory), which sees every allocation and
release, inside operators and custom ones too, on a CPU and on a GPU.
"""

import os
import resource
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from qstar.option_checks import check_folder
from qstar_bench.torch_internals import dump_snapshot, profiler_events, record_history

SNAPSHOT_EVENTS = 1_000_000  # the newest allocations that a snapshot's history holds
SAMPLE_SECONDS = 0.002
RANGES = "qstar."  # what their names begin with


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """Measure the most bytes that one call holds beside what was there before, its results included."""
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
    """Give the most bytes of memory that this process has held so far, libraries included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux


def _cpu_peak_bytes(run: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        kept = run()
    del kept
    return max((held for _, held in _held(log, "cpu")), default=0)


def _held(log: profile, device: str) -> list[tuple[int, int]]:
    """(nanoseconds, bytes held then beside what was there before) after each allocation or release."""
    kind = torch.device(device).type.upper()
    events = [event for event in profiler_events(log) if event.name() == "[memory]"]
    found: list[tuple[int, int]] = []
    held = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.device_type().name == kind:
            held += event.nbytes()
            found.append((event.start_ns(), held))
    return found


@dataclass
class MeasuredMemory:
    """Hold what `memory_snapshot` found; filled in when it ends.

    before: bytes of tensors that were there already; phases: the most bytes of tensors in each named range,
    of nested ones the outermost, what runs between two belonging to the former; resident: the same of the
    process's resident memory, on a CPU; allocator: a GPU allocator's own peaks, "allocated" and "reserved".
    """

    before: int = 0
    phases: dict[str, int] = field(default_factory=dict)
    resident: dict[str, int] = field(default_factory=dict)
    allocator: dict[str, int] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        return max(self.phases.values(), default=self.before)


def check_snapshot(path: str | os.PathLike | None, device: str) -> None:
    """Check a snapshot's path. Raises ValueError if `memory_snapshot` could not write it."""
    if path is None:
        return
    if device == "cpu":
        raise ValueError(f"snapshot = {path}: must be left out on a CPU, whose allocator has none")
    check_folder("snapshot", path)


@contextmanager
def memory_snapshot(
    path: str | os.PathLike | None = None, device: str | None = None, before: int = 0
) -> Iterator[MeasuredMemory]:
    """Measure what runs inside; on a GPU also write a snapshot for PyTorch's memory viewer
    (https://pytorch.org/memory_viz), at the end, and when something inside runs out of memory.

    path: of the snapshot (.pickle), None: none; device: "cpu" or "cuda", default: cuda where there is a GPU;
    before: bytes of tensors that are there already, on a CPU, where torch keeps no count. The named ranges
    are those whose name begins with "qstar.". Raises ValueError for a path on a CPU, whose allocator has no
    snapshots, or in no folder.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_snapshot(path, device)
    found = MeasuredMemory(before=before)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        found.before = torch.cuda.memory_allocated()
        if path is not None:
            record_history(SNAPSHOT_EVENTS)
    log = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    samples: list[tuple[int, int]] = []
    try:
        with log, _resident_memory(samples) if device == "cpu" else nullcontext():
            yield found
    finally:  # out of memory is when a snapshot is wanted most
        if device == "cuda":
            torch.cuda.synchronize()
            if path is not None:
                dump_snapshot(str(path))
                record_history(None)
            found.allocator = {
                "allocated": torch.cuda.max_memory_allocated(),
                "reserved": torch.cuda.max_memory_reserved(),
            }
        begun = _outermost(log)
        found.phases = _highest([(at, found.before + held) for at, held in _held(log, device)], begun)
        found.resident = _highest(samples, begun)


def _outermost(log: profile) -> list[tuple[int, str]]:
    """(nanoseconds, name) at which each outermost named range began, in order."""
    events = [event for event in profiler_events(log) if event.name().startswith(RANGES)]
    ranges = [(event.start_ns(), event.end_ns(), event.name()) for event in events]
    found: list[tuple[int, str]] = []
    last = 0
    for start, end, name in sorted(ranges):
        if start >= last:
            found.append((start, name))
            last = end
    return found


def _highest(points: list[tuple[int, int]], begun: list[tuple[int, str]]) -> dict[str, int]:
    """Find the largest value of each phase, from (nanoseconds, value) in order."""
    found = dict.fromkeys((name for _, name in begun), 0)
    starts = [start for start, _ in begun]
    for at, value in points:
        i = bisect_right(starts, at)
        if i:
            name = begun[i - 1][1]
            found[name] = max(found[name], value)
    return found


@contextmanager
def _resident_memory(samples: list[tuple[int, int]]) -> Iterator[None]:
    """Add (nanoseconds, bytes) of this process every SAMPLE_SECONDS, in a thread: what lives shorter may be
    missed. Needs /proc, so Linux; elsewhere the samples stay empty."""
    status = Path("/proc/self/statm")
    if not status.exists():
        yield
        return
    over, page = threading.Event(), os.sysconf("SC_PAGE_SIZE")

    def sample() -> None:
        with status.open() as file:
            while not over.wait(SAMPLE_SECONDS):
                file.seek(0)
                samples.append((time.time_ns(), int(file.read().split()[1]) * page))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
