"""Draw how the embedded model learns to think, by one knob of the method at a time: `make curves`.

Each setting runs with several seeds. Every finished run is a line of runs.jsonl in the output folder; a later
call does the runs that are missing there. Figures and table are made from those lines alone.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from experiments.curves.curves_figures import LEARNED, draw, summary
from experiments.curves.curves_run import Setting, Size, run, run_key
from experiments.shared import study
from experiments.shared.comparison import Row
from qstar.demo.town import STEPS
from qstar.reporting import tables
from qstar.reporting.benchmark_record import TableArguments, finish, machine
from qstar.reporting.results_file import ResultsFile

LONGER, LONGEST = 3, 9  # factors of the steps where a useful thought is rarely drawn
# the levels that each figure compares, in the order of the runs
FIGURES: dict[str, dict[str, Setting]] = {
    "thought_length": {f"k = {k}": Setting(thought_length=k) for k in (0, 1, 2, 4, STEPS, 12)},
    "policy": {"with policy term": Setting(), "without": Setting(policy_weight=0.0)},
    "useful_share": {
        f"share {share}, steps x {longer}": Setting(useful_share=share, longer=longer)
        for share, longer in ((1.0, 1), (0.2, 1), (0.05, LONGER), (0.01, LONGER), (0.01, LONGEST))
    },
    "policy_weight": {
        f"weight {weight:g}, T {temperature:g}": Setting(
            policy_weight=weight, reinforce_temperature=temperature
        )
        for weight, temperature in ((0, 1), (0.1, 1), (1, 1), (1, 3), (10, 1), (1e6, 1), (1e6, 3))
    },
    "boundary": {
        "dash": Setting(),
        "random": Setting(boundary="random"),
        "random, rate x 100": Setting(boundary="random", boundary_scale=100.0),
        f"random, rate x 100, steps x {LONGER}": Setting(
            boundary="random", boundary_scale=100.0, longer=LONGER
        ),
    },
    "num_thoughts": {f"R = {n}": Setting(num_thoughts=n) for n in (1, 2, 4)},
}


@dataclass
class CurvesArguments:
    """Options of `python -m experiments.curves`."""

    figures: list[str] = field(
        default_factory=lambda: list(FIGURES), metadata={"help": f"Figures to draw: {', '.join(FIGURES)}."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2, 3, 4],
        metadata={"help": "Seeds of the training text, its order and the thoughts."},
    )
    training_steps: int = field(
        default=40,
        metadata={"help": f"Optimiser steps of a run; some take {LONGER} or {LONGEST} times as many."},
    )
    test_walks: int = field(default=200, metadata={"help": "Unseen walks to test with."})
    base_steps: int = field(
        default=300, metadata={"help": "Steps in which a base model sees its own share of useful asides."}
    )
    output_dir: str = field(
        default="outputs/curves",
        metadata={"help": "Folder of runs, figures and base models; a later call resumes from it."},
    )
    draw_only: bool = field(default=False, metadata={"help": "Run nothing: figures of the runs there."})


def main(argv: list[str] | None = None) -> int:
    return study.run("curves", [CurvesArguments, TableArguments], measure, argv)


def measure(args: CurvesArguments, output: TableArguments) -> None:
    """Do the runs that are missing, then draw the figures and print their table."""
    chosen = set(args.figures)
    if not chosen or not chosen <= set(FIGURES) or len(chosen) < len(args.figures):
        raise ValueError(f"figures = {args.figures}: must be different ones of {', '.join(FIGURES)}")
    study.check_different(args, seeds=0)
    study.check_least(args, training_steps=1, test_walks=1, base_steps=1)
    folder = Path(args.output_dir)
    if args.draw_only and not (folder / "runs.jsonl").is_file():
        raise ValueError(f"output_dir = {args.output_dir}: has no runs.jsonl to draw from")
    began = time.perf_counter()
    size = Size(args.training_steps, args.test_walks, args.base_steps)
    figures = {name: FIGURES[name] for name in args.figures}
    folder.mkdir(parents=True, exist_ok=True)
    runs = ResultsFile(folder / "runs.jsonl", "those of finished runs", run_key, ("points",))
    wanted = [(x, seed) for levels in figures.values() for x in levels.values() for seed in args.seeds]
    wanted = list(dict.fromkeys(wanted))  # figures share settings
    missing = [(x, seed) for x, seed in wanted if (x, size, seed) not in runs]
    if not args.draw_only:
        for setting, seed in tqdm(missing, desc="runs", disable=output.json):
            runs.add(run(setting, seed, size, folder / "bases"))

    rows: list[Row] = []
    for name, levels in figures.items():
        found = {
            level: [row for seed in args.seeds if (row := runs.get((x, size, seed))) is not None]
            for level, x in levels.items()
        }
        if found := {level: of for level, of in found.items() if of}:
            draw(name, found, folder / f"{name}.png")
            rows += summary(name, found)
    if not rows:
        raise ValueError(f"output_dir = {args.output_dir}: has no run of these figures, seeds and sizes")
    if not output.json:
        print(tables.table(rows, digits=3))
        print(
            f"({args.test_walks} unseen walks, after the last step; a seed has learned where its accuracy is "
            f"over {LEARNED}; NLL in nats a token)\nfigures: {folder}/*.png"
        )
    finish("curves", args, machine("cpu"), rows, output, seconds=time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(main())
