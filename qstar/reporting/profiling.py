"""Write traces for Perfetto or chrome://tracing, with the named phases of `qstar.profiler_ranges`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile, schedule
from transformers import TrainerCallback

from qstar.option_checks import check_folder

TRACED_STEPS = 3  # after the first step of a Trainer's run, which is slower than the others


def _activities() -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]


@contextmanager
def traced(path: str | None) -> Iterator[None]:
    """Write what runs inside as a chrome trace: operators, kernels of a GPU, allocations, and every named
    range; nothing if path is None. Raises ValueError for a path whose folder does not exist."""
    if path is None:
        yield
        return
    check_folder("trace", path)
    with profile(activities=_activities(), profile_memory=True) as recorded:
        yield
    recorded.export_chrome_trace(path)


class TraceSteps(TrainerCallback):
    """Write the second to fourth step of a Trainer's run as one chrome trace, in the first process only.

    A callback of the Trainer, and a context around its run: `with tracer: trainer.train()`. Raises ValueError
    for a path whose folder does not exist, and at the start of a run of a single step.
    """

    def __init__(self, path: str):
        check_folder("trace", path)
        self.path = path
        self._profile: profile | None = None

    def __enter__(self) -> TraceSteps:
        return self

    def __exit__(self, *error: object) -> None:
        if self._profile is not None:
            self._profile.stop()  # writes what there is of a run that ended before the fourth step
            self._profile = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.max_steps - state.global_step < 2:
            raise ValueError(f"trace = {self.path}: needs a run of at least 2 steps; the first is not traced")
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
