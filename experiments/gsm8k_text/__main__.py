"""Ask whether a real language model thinks on GSM8K's text: `make proof-real` with TEXT."""

import hashlib
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from experiments.gsm8k_text import corpus, gsm8k_results
from experiments.gsm8k_text.gsm8k_training import EVALUATION_BATCH, Gsm8kStudy
from experiments.shared import study
from experiments.shared.fine_tuning import FineTuning
from qstar.checkpoint import fingerprint
from qstar.config import QuietStarConfig
from qstar.evaluation.results import Results
from qstar.evaluation.statistics import RESAMPLES
from qstar.evaluation.text import Span
from qstar.reporting import tables

TITLES = {"drawn": "tokens drawn at random", "results": "results of calculations"}
THINKING = (  # options of the method, unless the command line gives others
    "--thought_length=8",
    "--talk_length=1",
    "--num_thoughts=1",  # without a policy there is nothing to compare them by
    "--writer=base",
    "--policy_weight=0",
    "--base_weight=0.5",
    "--talk_weight=0.1",
    "--boundary_scale=1",
)


@dataclass
class Gsm8kArguments:
    """Options of `python -m experiments.gsm8k_text`."""

    model: str = field(metadata={"help": "Folder of SmolLM2-135M, or of another causal LM."})
    data: str = field(metadata={"help": "JSONL file in GSM8K's format; its last texts are held out."})
    calculations: str = field(
        default="removed",
        metadata={"help": "kept: 'sold 48/2 = 24 clips' in the text; or removed: 'sold 24 clips'."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the texts' order, the targets and the thoughts."})
    aside_steps: int = field(
        default=50,
        metadata={"help": "Steps on texts with asides, without thoughts, before all else; 0: skip them."},
    )
    aside_learning_rate: float = field(default=3e-4, metadata={"help": "Learning rate of these steps."})
    steps: int = field(default=30, metadata={"help": "Optimiser steps of the control and of the model."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of the base model's layers."})
    mixing_learning_rate: float = field(default=3e-3, metadata={"help": "Learning rate of the mixing head."})
    boundary_learning_rate: float = field(default=1e-3, metadata={"help": "Rate of <start> and <end>."})
    batch: int = field(default=4, metadata={"help": "Texts of a step."})
    trainable_layers: int = field(default=10, metadata={"help": "Last layers that learn, in every phase."})
    positions: int = field(
        default=2,
        metadata={
            "help": "Think before every result and at so many other tokens of a text; -1: as "
            "--thinking_positions says."
        },
    )
    longest: int = field(default=96, metadata={"help": "Leave out texts with more tokens."})
    test_texts: int = field(default=40, metadata={"help": "Hold out so many of the last texts."})
    tokens_per_text: int = field(default=14, metadata={"help": "Tokens of each to score, drawn at random."})
    output_dir: str = field(
        default="outputs/gsm8k_text",
        metadata={"help": "Folder of results and of the model after the asides."},
    )


def main(argv: list[str] | None = None) -> int:
    return study.run("gsm8k_text", [Gsm8kArguments, QuietStarConfig], prove, argv, THINKING)


def prove(args: Gsm8kArguments, config: QuietStarConfig) -> None:
    """Measure every condition on both kinds of targets, then show what came out."""
    study.check_least(
        args, seed=0, aside_steps=0, steps=1, batch=1, positions=-1, tokens_per_text=1, test_texts=2
    )
    study.check_model(args.model)
    began = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train, test = _texts(args, tokenizer)
    asked = {
        "drawn": corpus.drawn_spans(test, args.tokens_per_text, args.seed),
        "results": corpus.result_spans(test),
    }
    if len(asked["results"]) < 2:
        raise ValueError(
            f"data = {args.data!r}: {len(asked['results'])} of the last {args.test_texts} texts have the "
            "result of a calculation, an interval needs 2"
        )
    settings = _settings(args, config)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        name: (spans, Results({"spans": name, **settings}, str(folder / f"{name}.jsonl")))
        for name, spans in asked.items()
    }
    recipe = FineTuning(**{knob.name: getattr(args, knob.name) for knob in fields(FineTuning)})
    proof = Gsm8kStudy(
        model=args.model,
        tokenizer=tokenizer,
        train=train,
        config=config,
        recipe=recipe,
        asides=replace(recipe, steps=args.aside_steps, learning_rate=args.aside_learning_rate),
        positions=None if args.positions < 0 else args.positions,
        seed=args.seed,
        folder=folder,
    )
    proof.measure(list(found.values()))
    shown, holds = _show(found, proof.conditions)
    tables.last_line({**shown, **holds, "settings": settings, "seconds": time.perf_counter() - began})


def _texts(args: Gsm8kArguments, tokenizer: Any) -> tuple[list[corpus.Worked], list[corpus.Worked]]:
    """Return (the texts to train on, those held out)."""
    texts = corpus.read(args.data, tokenizer, args.calculations, args.longest)
    train, test = texts[: -args.test_texts], texts[-args.test_texts :]
    if len(train) < args.batch:
        raise ValueError(
            f"test_texts = {args.test_texts}: leaves {len(train)} of {len(texts)} texts to train on, a batch "
            f"has {args.batch}"
        )
    return train, test


def _settings(args: Gsm8kArguments, config: QuietStarConfig) -> dict[str, Any]:
    """Return what all runs of a file of results must agree in."""
    given = {name: value for name, value in asdict(args).items() if name != "output_dir"}
    files = {
        "model": fingerprint(args.model),
        "data": hashlib.sha256(Path(args.data).read_bytes()).hexdigest(),
    }
    return {**given, **asdict(config), **files, "evaluation_batch": EVALUATION_BATCH}


def _show(
    found: dict[str, tuple[list[Span], Results]], conditions: list[str]
) -> tuple[dict[str, Any], dict[str, bool]]:
    """Print the tables and what they say; return (the figures, the verdicts)."""
    shown: dict[str, Any] = {}
    for name, (spans, measured) in found.items():
        rows, differences, best = gsm8k_results.summary(spans, measured, conditions)
        shown[name] = {"conditions": rows, "differences": differences, "best_temperature": best}
        headers = {"all": f"NLL, {TITLES[name]}", "hard": "NLL, hardest 10 %"}
        print(f"\n{tables.intervals(rows, headers | {'weight': 'mean w'}, 4)}\n")
        print(tables.intervals(differences, headers, 4))
    everything = shown["drawn"]["differences"]
    helps = {name: gsm8k_results.helps(shown[name]["differences"]) for name in shown}
    keeps = gsm8k_results.keeps_its_language(everything)
    print(
        f"\n[ ]: 95 % interval, bootstrap over texts ({RESAMPLES} draws), paired; greedy thoughts.\n"
        "Thoughts help where they are below the control, the shuffled thoughts and w = 0, each with the\n"
        "whole interval. A gain on the hardest tokens alone is none: see the other temperatures."
    )
    for name, does in helps.items():
        print(f"{study.verdict(does)}: thoughts help, {TITLES[name]}")
    print(f"{study.verdict(keeps)}: w = 0 at most {gsm8k_results.LANGUAGE} nats above the control")
    return shown, {**{f"helps_{name}": does for name, does in helps.items()}, "keeps_its_language": keeps}


if __name__ == "__main__":
    sys.exit(main())
