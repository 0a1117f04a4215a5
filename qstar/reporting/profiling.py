"""Traces for Perfetto or chrome://tracing, with the named phases of `qstar.profiler_ranges` in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile, schedule
from transformers import TrainerCallback

from qstar.reporting.benchmark_record import check_folder

TRACED_STEPS = 3  # of a run of the Trainer, after the first, which is slower than the others


def _activities() -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]


@contextmanager
def traced(path: str | None, memory: bool = True) -> Iterator[None]:
    """Write what runs inside as a chrome trace: operators, kernels of a GPU, allocations, and every named
    range. path None: nothing is recorded. Raises ValueError for a path whose folder does not exist."""
    if path is None:
        yield
        return
    check_folder("trace", path)
    with profile(activities=_activities(), profile_memory=memory) as recorded:
        yield
    recorded.export_chrome_trace(path)


class TraceSteps(TrainerCallback):
    """Writes the second to fourth step of a Trainer's run as one chrome trace, of the first process alone.

    One of the Trainer's callbacks, and a context around its run: `with tracer: trainer.train()`. Raises
    ValueError for a path whose folder does not exist, and at the begin of a run of a single step.
    """

    def __init__(self, path: str):
        check_folder("trace", path)
        self.path = path
        self._profile: profile | None = None

    def __enter__(self) -> TraceSteps:
        return self

    def __exit__(self, *error: object) -> None:
        if self._profile is not None:
            self._profile.stop()  # a run that ended before the fourth step: what there is, is written
            self._profile = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.max_steps - state.global_step < 2:
            raise ValueError(f"trace = {self.path}: needs a run of at least 2 steps, the first is not traced")
        if state.is_world_process_zero:
            self._profile = profile(
                activities=_activities(),
                schedule=schedule(wait=0, warmup=1, active=TRACED_STEPS, repeat=1),
                on_trace_ready=lambda recorded: recorded.export_chrome_trace(self.path),
                profile_memory=True,
            )
            self._profile.start()

    def on_step_end(self, args, state, control, **kwargs):
        if self._profile is not None:
            self._profile.step()
