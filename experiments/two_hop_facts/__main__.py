"""Ask whether a real language model thinks on a built two-hop task on real facts: `make proof-real`."""

import sys
import time
from dataclasses import asdict, dataclass, field
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.shared import study
from experiments.shared.fine_tuning import FineTuning, fine_tune
from experiments.two_hop_facts import facts_results, facts_training
from experiments.two_hop_facts.facts_results import OVER_CONTROL, OVER_SHUFFLED, thoughts
from experiments.two_hop_facts.facts_task import TEST_FACTS, Split
from qstar.checkpoint import fingerprint
from qstar.reporting import tables
from qstar.reporting.results_file import ResultsFile, Row


@dataclass
class FactsArguments:
    """Options of `python -m experiments.two_hop_facts`."""

    model: str = field(
        metadata={"help": "Folder of SmolLM2-135M, or of any causal LM with a token for each letter."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "Seeds of the order of the training facts, the mixing head and the thoughts."},
    )
    splits: int = field(default=3, metadata={"help": "Splits into training and test facts."})
    lengths: list[int] = field(
        default_factory=lambda: [1, 2, 4], metadata={"help": "Thought tokens of each condition that thinks."}
    )
    steps: int = field(default=30, metadata={"help": "Optimiser steps of every condition."})
    test_facts: int = field(default=TEST_FACTS, metadata={"help": "Unseen facts to test each split with."})
    trainable_layers: int = field(
        default=10, metadata={"help": "Last layers that learn, in every condition."}
    )
    output_dir: str = field(
        default="outputs/two_hop_facts",
        metadata={"help": "Folder of the results and the figure; a later run resumes from it."},
    )


def main(argv: list[str] | None = None) -> int:
    return study.run("two_hop_facts", [FactsArguments], prove, argv)


def prove(args: FactsArguments) -> None:
    """Measure every condition in every split and seed, then show and draw what came out."""
    study.check_least(args, splits=1, steps=1)
    study.check_different(args, seeds=0, lengths=1)
    study.check_model(args.model)
    began = time.perf_counter()
    recipe = FineTuning(steps=args.steps, trainable_layers=args.trainable_layers)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    splits = [Split.make(tokenizer, number, args.test_facts) for number in range(args.splits)]
    knobs = asdict(facts_training.thinking(1))
    del knobs["thought_length"]
    settings = {"model": fingerprint(args.model), "test_facts": args.test_facts, **asdict(recipe), **knobs}
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    key = itemgetter("seed", "split", "condition")
    found = ResultsFile(folder / "results.jsonl", "those of a proof", key, ("facts", "correct"), settings)
    thinking = {"pause": 0, **{thoughts(k): k for k in args.lengths}}
    todo = list(product(args.seeds, range(args.splits), ("before", "control", *thinking)))
    for seed, number, condition in tqdm(todo, desc="conditions"):
        if (seed, number, condition) not in found:
            about = {"seed": seed, "split": number, "condition": condition}
            for row in _measure(args.model, recipe, splits[number], about, thinking.get(condition)):
                found.add(row)

    rows = [r for r in found.rows if r["seed"] in args.seeds and r["split"] < args.splits]
    shown, claims = facts_results.summary(rows, args.lengths)
    facts_results.figure(shown, facts_results.accuracy(rows), folder / "two_hop_facts.png")
    print(tables.table(shown, digits=3))
    print(f"({args.test_facts} unseen facts a split; accuracy, NLL in nats, both among the 26 letters)\n")
    print(tables.table(claims, digits=3))
    holds = {k: facts_results.holds(claims, k) for k in args.lengths}
    for k, does in holds.items():
        print(
            f"{study.verdict(does)}: {thoughts(k)} at least {OVER_CONTROL} above the control and "
            f"{OVER_SHUFFLED} above shuffled thoughts, and in no split below either"
        )
    print(f"figure: {folder / 'two_hop_facts.png'}")
    tables.last_line(
        {
            "conditions": shown,
            "differences": claims,
            "holds": holds,
            "seeds": args.seeds,
            "splits": args.splits,
            "settings": settings,
            "training_seconds": sum(row["seconds"] for row in rows),
            "seconds": time.perf_counter() - began,
        }
    )


def _measure(model: str, recipe: FineTuning, split: Split, about: Row, length: int | None) -> list[Row]:
    """Train a condition and return the rows of its tests; length: thought tokens of one that thinks."""
    began = time.perf_counter()
    trained: Any
    if about["condition"] == "before":
        trained = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    else:
        config = None if length is None else facts_training.thinking(length)
        rows = split.rows(split.train)
        trained = fine_tune(model, split.tokenizer, rows, config, recipe, about["seed"])
    answers = facts_training.answers(trained, split, about["seed"])
    names = ("w = 1", "w = 0", "shuffled") if length else ()  # a pause has no content to shuffle
    # the condition itself comes last: where its row is, there are the others
    tests = {f"{about['condition']}, {name}": answers[name] for name in names}
    tests[about["condition"]] = answers["plain" if length is None else "thoughts"]
    results = [
        about
        | {
            "condition": name,
            "seconds": 0.0,
            "facts": split.numbers,
            "correct": answer.correct.int().tolist(),
            "nll": [round(x, 4) for x in answer.nll.tolist()],
            "said": answer.said,
        }
        for name, answer in tests.items()
    ]
    results[-1]["seconds"] = time.perf_counter() - began
    return results


if __name__ == "__main__":
    sys.exit(main())
