"""`qstar proof-real`: does a real language model think? A built two-hop task on real facts, in every
condition."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from experiments.two_hop_facts import facts_results, facts_training
from experiments.two_hop_facts.facts_task import TEST_FACTS, Split
from qstar.checkpoint import fingerprint
from qstar.cli.options import parse_options
from qstar.reporting import tables


@dataclass
class ProofArguments:
    """Options of `qstar proof-real`."""

    model: str = field(
        metadata={"help": "Folder of SmolLM2-135M, or of any causal LM with a token for each letter."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "Seeds of the order of the training facts, the mixing head and the thoughts."},
    )
    splits: int = field(default=3, metadata={"help": "Splits into training and test facts."})
    lengths: list[int] = field(
        default_factory=lambda: [1, 2, 4], metadata={"help": "Thought tokens, one condition each."}
    )
    steps: int = field(default=30, metadata={"help": "Optimiser steps of every condition."})
    test_facts: int = field(default=TEST_FACTS, metadata={"help": "Facts of a split to test with."})
    trainable_layers: int = field(
        default=10, metadata={"help": "Last layers that learn, of every condition."}
    )
    output_dir: str = field(
        default="outputs/proof_real",
        metadata={"help": "Results, test fact by test fact, and the figure; a run goes on with those there."},
    )


def main(argv: list[str]) -> int:
    (args,) = parse_options(ProofArguments, argv, prog="qstar proof-real")
    _check(args)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    began = time.perf_counter()
    recipe = facts_training.Recipe(steps=args.steps, trainable_layers=args.trainable_layers)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    splits = [Split.make(tokenizer, number, args.test_facts) for number in range(args.splits)]
    config = facts_training.thinking(1)
    settings = {
        "model": fingerprint(args.model),
        "test_facts": args.test_facts,
        **asdict(recipe),
        **{name: x for name, x in asdict(config).items() if name != "thought_length"},
    }
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    found = facts_results.Results(settings, folder / "results.jsonl")
    conditions = {
        "before": None,
        "control": None,
        "pause": 0,
        **{facts_results.thoughts(k): k for k in args.lengths},
    }
    todo = [(seed, split, x) for seed in args.seeds for split in range(args.splits) for x in conditions]
    for seed, number, name in tqdm(todo, desc="conditions"):
        if not found.has(seed, number, name):
            run = _Run(seed, number, name, conditions[name])
            _measure(found, args.model, recipe, splits[number], run)

    rows = [r for r in found.rows if r["seed"] in args.seeds and r["split"] < args.splits]
    shown, claims = facts_results.summary(rows, args.lengths)
    facts_results.figure(shown, facts_results.accuracy(rows), folder / "proof_real.png")
    print(tables.table(shown, digits=3))
    print(f"({args.test_facts} unseen facts a split; accuracy, NLL in nats, both among the 26 letters)\n")
    print(tables.table(claims, digits=3))
    holds = {k: facts_results.holds(claims, k) for k in args.lengths}
    for k, does in holds.items():
        print(
            f"{facts_results.thoughts(k)}: {'holds' if does else 'DOES NOT HOLD'} "
            f"(at least {facts_results.OVER_CONTROL} over the control and "
            f"{facts_results.OVER_SHUFFLED} over shuffled thoughts, no split below either)"
        )
    print(f"figure: {folder / 'proof_real.png'}")
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
    return 0


def _check(args: ProofArguments) -> None:
    for name in ("splits", "steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} = {getattr(args, name)}: must be at least 1")
    for name, least in (("seeds", 0), ("lengths", 1)):
        values = getattr(args, name)
        if not values or min(values) < least or len(set(values)) < len(values):
            raise ValueError(f"{name} = {values}: must be different numbers, each at least {least}")
    if not Path(args.model).is_dir():
        raise ValueError(f"model = {args.model!r}: no such folder")


@dataclass(frozen=True)
class _Run:
    """A condition of a split and seed; length: thought tokens of one that thinks."""

    seed: int
    split: int
    condition: str
    length: int | None


def _measure(
    found: facts_results.Results, model: str, recipe: facts_training.Recipe, split: Split, run: _Run
) -> None:
    """Train a condition, test it, and keep the lines of it and of the tests that belong to it."""
    began = time.perf_counter()
    trained: Any
    if run.condition == "before":
        trained = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    else:
        config = None if run.length is None else facts_training.thinking(run.length)
        trained = facts_training.train(model, split, config, recipe, run.seed)
    tests = {"plain": "", "thoughts": ""}
    if run.length:  # a pause has no content that could be shuffled
        tests |= {name: f", {name}" for name in ("w = 0", "w = 1", "shuffled")}
    answers = facts_training.answers(trained, split, run.seed)
    # the condition itself comes last: where it is there, so are the others
    for name in sorted(tests.keys() & answers.keys(), key=lambda name: tests[name], reverse=True):
        answer = answers[name]
        found.add(
            {
                "seed": run.seed,
                "split": run.split,
                "condition": run.condition + tests[name],
                "seconds": 0.0 if tests[name] else time.perf_counter() - began,
                "facts": split.numbers,
                "correct": answer.correct.int().tolist(),
                "nll": [round(x, 4) for x in answer.nll.tolist()],
                "said": answer.said,
            }
        )
