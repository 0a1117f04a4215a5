"""`qstar proof-text`: does thinking help a real language model on GSM8K's text? Every condition, side by
side."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import logging

from experiments.gsm8k_text import corpus, gsm8k_results
from experiments.gsm8k_text.gsm8k_training import EVALUATION_BATCH, Study
from experiments.two_hop_facts.facts_training import Recipe
from qstar.checkpoint import fingerprint
from qstar.cli.options import parse_options, with_config_file
from qstar.config import QuietStarConfig
from qstar.evaluation.results import Results
from qstar.evaluation.statistics import RESAMPLES
from qstar.evaluation.text import Span
from qstar.reporting import tables

TITLES = {"drawn": "tokens drawn at random", "results": "results of calculations"}
# the knobs of thinking with which the proof runs unless told otherwise
THINKING = {
    "thought_length": 8,
    "talk_length": 1,
    "num_thoughts": 1,  # without a policy there is nothing to compare them by
    "writer": "base",
    "policy_weight": 0.0,
    "base_weight": 0.5,
    "talk_weight": 0.1,
    "boundary_scale": 1.0,
}


@dataclass
class ProofTextArguments:
    """Options of `qstar proof-text`."""

    model: str = field(metadata={"help": "Folder of SmolLM2-135M, or of another causal LM."})
    data: str = field(metadata={"help": "JSONL file in GSM8K's format; its last texts are held out."})
    calculations: str = field(
        default="removed",
        metadata={"help": "In the text: kept, 'sold 48/2 = 24 clips'; or removed, 'sold 24 clips'."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the order of the texts and of what is drawn."})
    aside_steps: int = field(
        default=50,
        metadata={"help": "Steps of a plain language model on texts with asides, before all else; 0: none."},
    )
    aside_learning_rate: float = field(default=3e-4, metadata={"help": "Of these steps."})
    steps: int = field(default=30, metadata={"help": "Optimiser steps of the control and of the model."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Of the base model's layers in them."})
    mixing_learning_rate: float = field(default=3e-3, metadata={"help": "Of the mixing head."})
    boundary_learning_rate: float = field(default=1e-3, metadata={"help": "Of <start> and <end>."})
    batch: int = field(default=4, metadata={"help": "Texts in a step."})
    trainable_layers: int = field(default=10, metadata={"help": "Last layers that learn, in every phase."})
    positions: int = field(
        default=2,
        metadata={
            "help": "Think before every result and at so many other tokens of a text; -1: where "
            "thinking_positions says."
        },
    )
    longest: int = field(default=96, metadata={"help": "Texts with more tokens are left out."})
    test_texts: int = field(default=40, metadata={"help": "The last so many texts are held out."})
    tokens_per_text: int = field(default=14, metadata={"help": "Tokens of each that are scored, at random."})
    output_dir: str = field(
        default="outputs/proof_text", metadata={"help": "Results, and the model after the asides."}
    )

    def __post_init__(self) -> None:
        least = {"seed": 0, "aside_steps": 0, "steps": 1, "batch": 1, "positions": -1, "tokens_per_text": 1}
        for name, smallest in (least | {"test_texts": 2}).items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least {smallest}")
        if not Path(self.model).is_dir():
            raise ValueError(f"model = {self.model!r}: no such folder")


def main(argv: list[str]) -> int:
    defaults = [f"--{name}={value}" for name, value in THINKING.items()]
    types = (ProofTextArguments, QuietStarConfig)
    args, config = parse_options(types, defaults + with_config_file(argv), prog="qstar proof-text")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
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
    study = _study(args, config, tokenizer, train)
    study.measure(list(found.values()))
    shown, holds = _show(found, study.conditions)
    tables.last_line({**shown, **holds, "settings": settings, "seconds": time.perf_counter() - began})
    return 0


def _texts(args: ProofTextArguments, tokenizer: Any) -> tuple[list[corpus.Worked], list[corpus.Worked]]:
    """(those to train on, those held out)."""
    texts = corpus.read(args.data, tokenizer, args.calculations, args.longest)
    train, test = texts[: -args.test_texts], texts[-args.test_texts :]
    if len(train) < args.batch:
        raise ValueError(
            f"test_texts = {args.test_texts}: leaves {len(train)} of {len(texts)} texts to train on, a batch "
            f"has {args.batch}"
        )
    return train, test


def _settings(args: ProofTextArguments, config: QuietStarConfig) -> dict[str, Any]:
    """What a file of results must agree in."""
    given = {name: value for name, value in asdict(args).items() if name != "output_dir"}
    files = {
        "model": fingerprint(args.model),
        "data": hashlib.sha256(Path(args.data).read_bytes()).hexdigest(),
    }
    return {**given, **asdict(config), **files, "evaluation_batch": EVALUATION_BATCH}


def _study(
    args: ProofTextArguments, config: QuietStarConfig, tokenizer: Any, train: list[corpus.Worked]
) -> Study:
    recipe = Recipe(
        steps=args.steps,
        batch=args.batch,
        trainable_layers=args.trainable_layers,
        learning_rate=args.learning_rate,
        mixing_learning_rate=args.mixing_learning_rate,
        boundary_learning_rate=args.boundary_learning_rate,
    )
    return Study(
        model=args.model,
        tokenizer=tokenizer,
        train=train,
        config=config,
        recipe=recipe,
        asides=replace(recipe, steps=args.aside_steps, learning_rate=args.aside_learning_rate),
        positions=None if args.positions < 0 else args.positions,
        seed=args.seed,
        folder=Path(args.output_dir),
    )


def _show(
    found: dict[str, tuple[list[Span], Results]], conditions: list[str]
) -> tuple[dict[str, Any], dict[str, bool]]:
    """Print the tables and what they say; (the figures, the verdicts)."""
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
        "A gain counts where thoughts are below the control, the shuffled thoughts and w = 0, each"
        "\nbeyond its interval. A gain of the hardest tokens alone is none: see the other temperatures."
    )
    for name, does in helps.items():
        print(f"{TITLES[name]}: {'THOUGHTS HELP' if does else 'no gain of thoughts'}")
    print(f"w = 0 at most {gsm8k_results.LANGUAGE} above the control: {'yes' if keeps else 'NO'}")
    return shown, {**{f"helps_{name}": does for name, does in helps.items()}, "keeps_its_language": keeps}
