"""`qstar memory plan`: what a training step needs, what fits on a card, and a picture of it."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from qstar import QuietStarConfig
from qstar.cli.options import parse_options
from qstar.option_checks import check_folder
from qstar.reporting import tables
from qstar.reporting.benchmark_record import OutputArguments, finish, machine
from qstar_bench.memory.allocation_tracker import STEP_PHASES
from qstar_bench.memory.largest_fit import OPTIONS, USABLE, fit
from qstar_bench.memory.planned_step import CATEGORIES, MemoryPlan, Timeline, assumptions, describe, plan
from qstar_bench.memory.step_setup import MemoryStepArguments
from qstar_bench.report import run_plots

MOMENTS = 2000  # that are drawn: the highest of each stretch of events


@dataclass
class PlanArguments:
    """What is asked of a plan."""

    gpus: int = field(
        default=1, metadata={"help": "GPUs that share the step by FSDP2; the figures are of one."}
    )
    card_gb: float | None = field(
        default=None,
        metadata={"help": "GiB of a card: also find what fits on it. Takes a few minutes for 7B."},
    )
    plot: str | None = field(default=None, metadata={"help": "Draw memory over the step as this PNG."})

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ValueError(f"gpus = {self.gpus}: must be at least 1")
        if self.card_gb is not None and self.card_gb <= 0:
            raise ValueError(f"card_gb = {self.card_gb}: must be positive")
        check_folder("plot", self.plot)


def rows_of(found: MemoryPlan) -> list[dict[str, Any]]:
    """Show the highest moment of each phase, and of all: total and categories, in GiB, or MiB for small
    ones."""
    unit, size = ("GiB", 2**30) if found.peak_bytes > 4 * 2**30 else ("MiB", 2**20)
    moments = found.phases | {f"peak (in {found.timeline.phase_of_peak()})": found.peak}
    return [
        {"highest moment": name, f"total {unit}": sum(moment.values()) / size}
        | {category: nbytes / size for category, nbytes in moment.items()}
        for name, moment in moments.items()
    ]


def save_plot(timeline: Timeline, title: str, path: str) -> None:
    """Draw memory over the events of the step, stacked by category, with its phases marked."""
    with run_plots.style("black") as pyplot:
        stretches = np.array_split(np.arange(len(timeline.phase)), min(MOMENTS, len(timeline.phase)))
        shown = np.array([stretch[timeline.total[stretch].argmax()] for stretch in stretches])
        figure, axis = pyplot.subplots(figsize=(10, 5), layout="constrained")
        axis.stackplot(shown, timeline.bytes[shown].T / 2**30, labels=CATEGORIES, linewidth=0)
        begun = [0, *(np.flatnonzero(np.diff(timeline.phase)) + 1)]
        top = timeline.total.max() / 2**30
        heights = 1.03, 1.09  # by turns, as some phases are short
        for i, event in enumerate(begun):
            axis.axvline(event, color="black", linewidth=0.5)
            if len(begun) <= 2 * len(STEP_PHASES):  # with many chunks their names would cover one another
                name = STEP_PHASES[timeline.phase[event]].removeprefix("qstar.")
                axis.text(event, heights[i % 2] * top, f" {name}", fontsize=8)
        axis.set(
            xlabel="allocations and releases",
            ylabel="GiB",
            xlim=(0, shown[-1]),
            ylim=(0, 1.15 * top),
            title=title,
        )
        axis.legend(loc="lower right", fontsize=8, reverse=True)
        figure.savefig(path, dpi=120)
        pyplot.close(figure)


def main(argv: list[str]) -> int:
    types = (MemoryStepArguments, QuietStarConfig, PlanArguments, OutputArguments)
    args, thinking, asked, output = parse_options(types, argv, prog="qstar memory plan")
    if output.trace is not None:
        raise ValueError(f"trace = {output.trace}: must be left out, a plan runs nothing")
    if asked.gpus > 1 and args.device == "cpu":
        raise ValueError(f"gpus = {asked.gpus}: must be 1 with device = 'cpu'")
    found = plan(args, thinking, gpus=asked.gpus)
    rows = rows_of(found)
    if not output.json:
        print(describe(args, thinking, asked.gpus, found.parameters))
        print(assumptions(args, found))
        print(tables.table(rows, digits=2))
    figures: dict[str, Any] = {
        "thinking": asdict(thinking),
        "gpus": asked.gpus,
        "parameters": found.parameters,
        "peak_bytes": found.peak_bytes,
        "peak_phase": found.timeline.phase_of_peak(),
        "phases": found.phases,
    }
    if asked.card_gb is not None:
        figures["fits"] = [
            fit(name, args, thinking, asked.gpus, asked.card_gb)
            for name in tqdm(OPTIONS, desc="what fits", disable=output.json)
        ]
        if not output.json:
            print(f"\nThe most that fits into {USABLE:.0%} of {asked.card_gb:g} GiB, each alone:")
            print(tables.table(figures["fits"], digits=2))
    if asked.plot is not None:
        save_plot(
            found.timeline,
            f"{args.model}, {args.strategy}, {args.precision}: planned memory of a step",
            asked.plot,
        )
        if not output.json:
            print(f"plot: {asked.plot}")
    finish("memory plan", args, machine("cpu"), rows, output, **figures)
    return 0
