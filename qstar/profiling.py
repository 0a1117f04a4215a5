"""Traces for Perfetto or chrome://tracing, with the named phases of `qstar.phases` in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


@contextmanager
def traced(path: str | None, memory: bool = True) -> Iterator[None]:
    """Write what runs inside as a chrome trace: operators, kernels of a GPU, allocations, and every named
    range. path None: nothing is recorded. Raises ValueError for a path whose folder does not exist."""
    if path is None:
        yield
        return
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"trace = {path}: its folder does not exist")
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, profile_memory=memory) as recorded:
        yield
    recorded.export_chrome_trace(path)
