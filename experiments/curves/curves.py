"""`qstar bench curves`: how the embedded model learns to think, over training, by one knob of the method at a
time, each setting with several seeds.

Every finished run is a line of runs.jsonl in the output folder; a later call does the runs that are missing
there. Figures and table are made from those lines alone.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers.utils import logging

from experiments.curves.curves_figures import LEARNED, draw, summary
from experiments.curves.curves_run import Row, Setting, Size, run
from qstar.cli.options import parse_options
from qstar.demo.town import STEPS
from qstar.reporting import jsonl, tables
from qstar.reporting.benchmark_record import TableArguments, finish, machine

LONGER, LONGEST = 3, 9  # times the steps, where a useful thought is rarely drawn
# by figure, in the order in which they are run: the levels that it compares
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
    """What `qstar bench curves` takes."""

    figures: list[str] = field(
        default_factory=lambda: list(FIGURES), metadata={"help": f"Of {', '.join(FIGURES)}."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2, 3, 4],
        metadata={"help": "Seeds of the training text, its order and the thoughts."},
    )
    training_steps: int = field(
        default=40,
        metadata={"help": f"Optimiser steps of a run; of some {LONGER} or {LONGEST} times as many."},
    )
    test_walks: int = field(default=200, metadata={"help": "Unseen walks to test with."})
    base_steps: int = field(
        default=300, metadata={"help": "Steps in which a base model sees its own share of useful asides."}
    )
    output_dir: str = field(
        default="outputs/curves",
        metadata={"help": "Finished runs, figures and base models; a later call goes on with those there."},
    )
    draw_only: bool = field(default=False, metadata={"help": "Run nothing: figures of the runs there."})

    def __post_init__(self) -> None:
        if not self.figures or len(set(self.figures)) < len(self.figures) or set(self.figures) - {*FIGURES}:
            raise ValueError(f"figures = {self.figures}: must be different ones of {', '.join(FIGURES)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds = {self.seeds}: must be different numbers, each at least 0")
        for name in ("training_steps", "test_walks", "base_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")


Key = tuple[Setting, Size, int]  # and the seed


class Runs:
    """The finished runs of a file, one a line, and those that are added to it."""

    def __init__(self, path: Path):
        self.path = path
        self._rows: dict[Key, Row] = jsonl.resume(str(path), "those of finished runs", self._take)

    def _take(self, lines: list[Row]) -> dict[Key, Row]:
        return {self._key(row): row for row in lines if row["points"]}

    @staticmethod
    def _key(row: Row) -> Key:
        return Setting(**row["setting"]), Size(**row["size"]), row["seed"]

    def get(self, setting: Setting, size: Size, seed: int) -> Row | None:
        return self._rows.get((setting, size, seed))

    def add(self, row: Row) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            print(json.dumps(row, ensure_ascii=False), file=file)
        self._rows[self._key(row)] = row


def main(argv: list[str]) -> int:
    args, output = parse_options((CurvesArguments, TableArguments), argv, prog="qstar bench curves")
    folder = Path(args.output_dir)
    if args.draw_only and not (folder / "runs.jsonl").is_file():
        raise ValueError(f"output_dir = {args.output_dir}: has no runs.jsonl to draw from")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    began = time.perf_counter()
    size = Size(args.training_steps, args.test_walks, args.base_steps)
    figures = {name: FIGURES[name] for name in args.figures}
    folder.mkdir(parents=True, exist_ok=True)
    runs = Runs(folder / "runs.jsonl")
    wanted = [(x, seed) for levels in figures.values() for x in levels.values() for seed in args.seeds]
    wanted = list(dict.fromkeys(wanted))  # figures share settings
    missing = [(x, seed) for x, seed in wanted if runs.get(x, size, seed) is None]
    if not args.draw_only:
        for setting, seed in tqdm(missing, desc="runs", disable=output.json):
            runs.add(run(setting, seed, size, folder / "bases"))

    rows: list[dict[str, Any]] = []
    for name, levels in figures.items():
        found = {
            level: [row for seed in args.seeds if (row := runs.get(x, size, seed)) is not None]
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
            f"({args.test_walks} unseen walks; after the last step; a seed has learned where its accuracy "
            f"is over {LEARNED}; NLL in nats a token)\nfigures: {folder}/*.png"
        )
    finish("curves", args, machine("cpu"), rows, output, seconds=time.perf_counter() - began)
    return 0
