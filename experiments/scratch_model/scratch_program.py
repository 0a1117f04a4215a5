"""`qstar proof`: does a small model learn to think? From scratch, on several kinds of text at once."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm.auto import tqdm
from transformers.utils import logging

from experiments.scratch_model import scratch_base, scratch_results, scratch_training
from experiments.scratch_model.kinds import KINDS
from experiments.scratch_model.scratch_run import STAGES, Bench
from qstar.cli.options import parse_options
from qstar.reporting import tables


@dataclass
class ProofArguments:
    """Options of `qstar proof`."""

    seeds: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "Seeds of the base model, the training text, its order and the thoughts."},
    )
    base_steps: int = field(
        default=scratch_base.BaseRecipe.steps, metadata={"help": "Steps in which the base model is made."}
    )
    steps: int = field(
        default=scratch_training.Recipe.steps,
        metadata={"help": "Optimiser steps of both conditions after that."},
    )
    left_out: list[str] = field(
        default_factory=lambda: ["kinship"],
        metadata={"help": "Built kinds that are tested, but not in the text of those steps."},
    )
    questions: int = field(default=200, metadata={"help": "Unseen questions of each built kind."})
    texts: int = field(
        default=100, metadata={"help": "Unseen texts of each kind, of which every token is scored."}
    )
    output_dir: str = field(
        default="outputs/proof",
        metadata={"help": "Models, results and the figure; a run goes on with what is there."},
    )


def main(argv: list[str]) -> int:
    (args,) = parse_options(ProofArguments, argv, prog="qstar proof")
    _check(args)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    began = time.perf_counter()
    making = scratch_base.BaseRecipe(steps=args.base_steps)
    trained_on = tuple(kind for kind in KINDS if kind not in args.left_out)
    recipe = scratch_training.Recipe(steps=args.steps, kinds=trained_on)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench.make(folder, making, recipe, args.questions, args.texts)
    todo = [(seed, stage) for seed in args.seeds for stage in STAGES]
    for seed, stage in tqdm(todo, desc="stages"):
        bench.run(seed, stage)

    rows = [row for row in bench.found.rows if row["seed"] in args.seeds]
    kinds = [*KINDS, scratch_training.PROSE]
    conditions, differences = scratch_results.summary(rows, kinds)
    scratch_results.figure(rows, conditions, kinds, folder / "proof.png")
    print(
        f"\nseeds {', '.join(map(str, args.seeds))}; {args.questions} unseen questions of each kind; "
        f"left out of the Quiet-STaR text: {', '.join(args.left_out) or 'none'}; n: answers or tokens of all "
        "seeds; in brackets 95 % intervals\n\ndirect accuracy, of prose that of the next token"
    )
    print(tables.table(scratch_results.shown(conditions, "accuracy"), digits=3))
    for measure, label in (("nll", "all tokens"), ("hard", "the hardest tenth of the tokens of the base")):
        print(f"\nNLL in nats of {label}")
        print(tables.table(scratch_results.shown(conditions, measure), digits=3))
    print("\n" + tables.table(differences, digits=3))
    print("\nthe share of useful thoughts, and accuracy after a written-out aside")
    print(tables.table(scratch_results.diagnostics(rows, list(KINDS)), digits=3))
    holds = scratch_results.verdict(differences, list(KINDS))
    print(
        f"{_holds(holds['kinds'])}: thoughts at least {scratch_results.OVER} above the control and above "
        f"shuffled thoughts on at least {scratch_results.KINDS_OVER} kinds "
        f"(on {', '.join(holds['over']) or 'none'})\n"
        f"{_holds(holds['prose'])}: prose not more than {scratch_results.PROSE_WORSE} nats worse "
        "than the control"
    )
    prompt = bench.tests[next(iter(KINDS))].questions[0].text
    print(
        f"figure: {folder / 'proof.png'}; a model that thinks: try\n  qstar generate --model "
        f"{folder}/thinks-{args.seeds[0]} --prompt {prompt!r} --max_new_tokens 2 --show_thoughts"
    )
    tables.last_line(
        {
            "conditions": conditions,
            "differences": differences,
            "diagnostics": scratch_results.diagnostics(rows, list(KINDS)),
            "holds": holds,
            "seeds": args.seeds,
            "left_out": args.left_out,
            "settings": bench.settings,
            "seconds_by_seed": {
                seed: sum(row["seconds"] for row in rows if row["seed"] == seed) for seed in args.seeds
            },
            "arguments": asdict(args),
            "seconds": time.perf_counter() - began,
        }
    )
    return 0


def _holds(does: bool) -> str:
    return "holds" if does else "DOES NOT HOLD"


def _check(args: ProofArguments) -> None:
    for name, least in (("base_steps", 2), ("steps", 1), ("questions", 2), ("texts", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"{name} = {getattr(args, name)}: must be at least {least}")
    if not args.seeds or min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"seeds = {args.seeds}: must be different numbers, each at least 0")
    known = [*KINDS]
    if not set(args.left_out) < set(known):
        raise ValueError(f"left_out = {args.left_out}: must be some of {known}, not all")
