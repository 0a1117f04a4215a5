"""Ask whether a small model, made from scratch, learns to think on several kinds of text: `make proof`."""

import sys
import time
from dataclasses import asdict, dataclass, field
from operator import itemgetter
from pathlib import Path

from tqdm.auto import tqdm

from experiments.scratch_model import scratch_base, scratch_results, scratch_training
from experiments.scratch_model.kinds import KINDS
from experiments.scratch_model.scratch_run import STAGES, ScratchStudy
from experiments.shared import study
from qstar.reporting import tables
from qstar.reporting.results_file import ResultsFile


@dataclass
class ScratchArguments:
    """Options of `python -m experiments.scratch_model`."""

    seeds: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "Seeds of the base model, the training text, its order and the thoughts."},
    )
    base_steps: int = field(
        default=scratch_base.BaseRecipe.steps, metadata={"help": "Optimiser steps of the base model."}
    )
    steps: int = field(
        default=scratch_training.TrainingRecipe.steps,
        metadata={"help": "Optimiser steps of both conditions after those."},
    )
    left_out: list[str] = field(
        default_factory=lambda: ["kinship"],
        metadata={"help": "Built kinds that are tested but left out of the text of those steps."},
    )
    questions: int = field(default=200, metadata={"help": "Unseen questions of each built kind."})
    texts: int = field(
        default=100, metadata={"help": "Unseen texts of each kind; every token of them is scored."}
    )
    output_dir: str = field(
        default="outputs/scratch_model",
        metadata={"help": "Folder of models, results and the figure; a later run resumes from it."},
    )


def main(argv: list[str] | None = None) -> int:
    return study.run("scratch_model", [ScratchArguments], prove, argv)


def prove(args: ScratchArguments) -> None:
    """Run every stage of every seed, then show and draw what they measured."""
    study.check_least(args, base_steps=2, steps=1, questions=2, texts=1)
    study.check_different(args, seeds=0)
    if not set(args.left_out) < set(KINDS):
        raise ValueError(f"left_out = {args.left_out}: must be some of {[*KINDS]}, not all")
    began = time.perf_counter()
    making = scratch_base.BaseRecipe(steps=args.base_steps)
    trained_on = tuple(kind for kind in KINDS if kind not in args.left_out)
    recipe = scratch_training.TrainingRecipe(steps=args.steps, kinds=trained_on)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = scratch_base.make_tokenizer()
    kinds = [*KINDS, scratch_training.PROSE]
    tests = {x: scratch_training.Unseen.make(x, tokenizer, args.questions, args.texts) for x in kinds}
    settings = {
        "base": asdict(making),
        **asdict(recipe),
        "questions": args.questions,
        "texts": args.texts,
        **asdict(scratch_training.thinking()),
    }
    key = itemgetter("seed", "condition", "kind")
    found = ResultsFile(folder / "results.jsonl", "those of a proof", key, scratch_results.COLUMNS, settings)
    proof = ScratchStudy(folder, making, recipe, tokenizer, tests, found)
    todo = [(seed, stage) for seed in args.seeds for stage in STAGES]
    for seed, stage in tqdm(todo, desc="stages"):
        proof.run(seed, stage)

    rows = [row for row in found.rows if row["seed"] in args.seeds]
    conditions, differences = scratch_results.summary(rows, kinds)
    scratch_results.figure(rows, conditions, kinds, folder / "scratch_model.png")
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
        f"{study.verdict(holds['kinds'])}: thoughts at least {scratch_results.OVER} above the control and "
        f"above shuffled thoughts on at least {scratch_results.KINDS_OVER} kinds "
        f"(on {', '.join(holds['over']) or 'none'})\n"
        f"{study.verdict(holds['prose'])}: prose not more than {scratch_results.PROSE_WORSE} nats worse "
        "than the control"
    )
    prompt = tests[next(iter(KINDS))].questions[0].text
    print(
        f"figure: {folder / 'scratch_model.png'}; a model that thinks: try\n  qstar generate --model "
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
            "settings": settings,
            "seconds_by_seed": {
                seed: sum(row["seconds"] for row in rows if row["seed"] == seed) for seed in args.seeds
            },
            "arguments": asdict(args),
            "seconds": time.perf_counter() - began,
        }
    )


if __name__ == "__main__":
    sys.exit(main())
