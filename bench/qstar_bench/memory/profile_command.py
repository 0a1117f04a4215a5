"""`qstar memory profile`: a real training step's memory, by phase, beside what the plan said."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from qstar import QuietStarConfig
from qstar.cli.options import parse_options
from qstar.reporting import tables
from qstar.reporting.benchmark_record import OutputArguments, finish, machine
from qstar.reporting.profiling import traced
from qstar_bench.memory import step_setup
from qstar_bench.memory.memory_peaks import MeasuredMemory, check_snapshot, memory_snapshot
from qstar_bench.memory.planned_step import MemoryPlan, describe, plan
from qstar_bench.memory.step_setup import MemoryStepArguments
from qstar_bench.model_shapes import base_config, weights_of
from qstar_bench.torch_internals import storage_key, tree_leaves

MIB = 2**20


@dataclass
class ProfileArguments:
    """What is written besides."""

    snapshot: str | None = field(
        default=None,
        metadata={
            "help": "On a GPU: write this .pickle for pytorch.org/memory_viz, also when memory runs out."
        },
    )


def measure(
    args: MemoryStepArguments,
    thinking: QuietStarConfig,
    snapshot: str | None = None,
    trace: str | None = None,
) -> MeasuredMemory:
    """Measure one step of a model with random weights, or with those of a folder that has them."""
    assert args.device is not None and args.precision is not None
    config = base_config(args.model)
    step_setup.check_sizes(args, thinking, config)
    torch.manual_seed(0)
    with torch.device(args.device):
        model = step_setup.build(args, thinking, config, weights_of(args.model)).to(args.device)
        optimiser = step_setup.ready(model)
        ids = step_setup.text(args, config, args.device)
    there = tree_leaves(
        [list(model.parameters()), list(model.buffers()), list(optimiser.state.values()), ids]
    )
    there += [p.grad for p in model.parameters() if p.grad is not None]
    storages = {storage_key(x): x.untyped_storage().nbytes() for x in there}
    with memory_snapshot(snapshot, args.device, before=sum(storages.values())) as found:
        step_setup.step(model, optimiser, ids, args.precision)
    if trace is not None:
        with traced(trace):
            step_setup.step(model, optimiser, ids, args.precision)
    return found


def beside(planned: MemoryPlan, measured: MeasuredMemory) -> list[dict[str, Any]]:
    """Make a row for each phase and one for the step's peak, in MiB."""
    rows = []
    for phase, categories in planned.phases.items():
        rows.append(
            _row(phase, sum(categories.values()), measured.phases.get(phase, 0), measured.resident.get(phase))
        )
    resident = max(measured.resident.values(), default=None)
    return [*rows, _row("peak", planned.peak_bytes, measured.peak_bytes, resident)]


def _row(phase: str, planned: int, measured: int, resident: int | None) -> dict[str, Any]:
    row = {
        "phase": phase,
        "plan MiB": planned / MIB,
        "measured MiB": measured / MIB,
        "plan / measured": planned / measured if measured else None,
    }
    return row if resident is None else row | {"resident MiB": resident / MIB}


def main(argv: list[str]) -> int:
    types = (MemoryStepArguments, QuietStarConfig, ProfileArguments, OutputArguments)
    args, thinking, profile, output = parse_options(types, argv, prog="qstar memory profile")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = 'cuda': torch sees no GPU on this machine")
    check_snapshot(profile.snapshot, args.device)
    planned = plan(args, thinking)
    try:
        measured = measure(args, thinking, profile.snapshot, output.trace)
    except torch.OutOfMemoryError as error:
        written = "" if profile.snapshot is None else f" (snapshot: {profile.snapshot})"
        raise ValueError(
            f"the step, planned at {planned.peak_bytes / MIB:.0f} MiB, ran out of memory{written}: {error}"
        ) from error
    rows = beside(planned, measured)
    if not output.json:
        print(describe(args, thinking, 1, planned.parameters))
        print(tables.table(rows, digits=2))
        for name, nbytes in measured.allocator.items():
            print(f"the allocator's peak, {name}: {nbytes / MIB:.2f} MiB")
    figures = {
        "thinking": asdict(thinking),
        "planned_peak_bytes": planned.peak_bytes,
        "measured_peak_bytes": measured.peak_bytes,
        "allocator": measured.allocator,
    }
    finish("memory profile", args, machine(args.device), rows, output, **figures)
    return 0
