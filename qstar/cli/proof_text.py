"""`qstar proof-text`: does thinking help a real language model on GSM8K's text? Every condition, side by
side."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import AutoTokenizer
from transformers.utils import logging

from qstar import report
from qstar.checkpoint import fingerprint
from qstar.cli.options import parse_options, with_config_file
from qstar.config import QuietStarConfig
from qstar.evaluation import tables
from qstar.evaluation.results import Results
from qstar.proof_real.experiment import Recipe
from qstar.proof_text import corpus, results
from qstar.proof_text.experiment import EVALUATION_BATCH, Study

# the knobs of thinking with which the proof runs unless told otherwise
THINKING = {
    "thought_length": 8,
    "talk_length": 1,
    "num_thoughts": 1,  # without a policy there is nothing to compare them by
    "writer": "base",
    "policy_weight": 0.0,
    "base_weight": 0.5,
    "talk_weight": 0.5,
    "boundary_scale": 1.0,
}


@dataclass
class ProofTextArguments:
    """Options of `qstar proof-text`."""

    model: str = field(metadata={"help": "Folder of SmolLM2-135M, or of another causal LM."})
    data: str = field(metadata={"help": "JSONL file in GSM8K's format; its last texts are held out."})
    calculations: str = field(
        default="removed",
        metadata={"help": "kept: 'sold 48/2 = 24 clips'; removed: 'sold 24 clips'."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the order of the texts and of what is drawn."})
    aside_steps: int = field(
        default=60,
        metadata={"help": "Steps of a plain language model on texts with asides, before all else; 0: none."},
    )
    aside_learning_rate: float = field(default=3e-4, metadata={"help": "Of these steps."})
    steps: int = field(default=60, metadata={"help": "Optimiser steps of the control and of the model."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Of the base model's layers in these steps."})
    mixing_learning_rate: float = field(default=1e-3, metadata={"help": "Of the mixing head."})
    boundary_learning_rate: float = field(default=1e-2, metadata={"help": "Of <start> and <end>."})
    batch: int = field(default=4, metadata={"help": "Texts in a step."})
    trainable_layers: int = field(default=10, metadata={"help": "Last layers that learn, in every phase."})
    positions: int = field(
        default=8,
        metadata={
            "help": "Think before every result and at so many other tokens of a text; -1: where "
            "thinking_positions says."
        },
    )
    longest: int = field(default=96, metadata={"help": "Texts with more tokens are left out."})
    test_texts: int = field(default=40, metadata={"help": "The last so many texts are held out."})
    tokens_per_text: int = field(default=32, metadata={"help": "Tokens of each that are scored, at random."})
    output_dir: str = field(
        default="outputs/proof_text", metadata={"help": "Results, and the model after the asides."}
    )

    def __post_init__(self) -> None:
        for name, least in (
            ("seed", 0), ("aside_steps", 0), ("steps", 1), ("batch", 1), ("positions", -1), ("test_texts", 2), ("tokens_per_text", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least {least}")
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
    texts = corpus.read(args.data, tokenizer, args.calculations, args.longest)
    train, test = texts[: -args.test_texts], texts[-args.test_texts :]
    if len(train) < args.batch:
        raise ValueError(
            f"test_texts = {args.test_texts}: leaves {len(train)} of {len(texts)} texts to train on, a batch has {args.batch}"
        )
    recipe = Recipe(
        steps=args.steps,
        batch=args.batch,
        trainable_layers=args.trainable_layers,
        learning_rate=args.learning_rate,
        mixing_learning_rate=args.mixing_learning_rate,
        boundary_learning_rate=args.boundary_learning_rate,
    )
    asides = Recipe(
        steps=args.aside_steps,
        batch=args.batch,
        trainable_layers=args.trainable_layers,
        learning_rate=args.aside_learning_rate,
    )
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        **asdict(args),
        **asdict(config),
        "model": fingerprint(args.model),
        "data": hashlib.sha256(Path(args.data).read_bytes()).hexdigest(),
        "evaluation_batch": EVALUATION_BATCH,
    }
    settings.pop("output_dir")
    drawn, numbers = corpus.drawn_spans(test, args.tokens_per_text), corpus.result_spans(test)
    if len(numbers) < 2:
        raise ValueError(f"data = {args.data!r}: {len(numbers)} of the last {args.test_texts} texts have the result of a calculation, an interval needs 2")
    asked = [
        (spans, Results(settings | {"spans": name}, str(folder / f"{name}.jsonl")))
        for name, spans in (("drawn", drawn), ("numbers", numbers))
    ]
    study = Study(
        model=args.model,
        tokenizer=tokenizer,
        train=train,
        config=config,
        recipe=recipe,
        asides=asides,
        positions=None if args.positions < 0 else args.positions,
        seed=args.seed,
        folder=folder,
    )
    study.measure(asked)
    names = [name for x in study.contestants() for way, name in x.conditions.items() if name != results.JUDGE]
    shown = {}
    for title, (spans, found) in zip(("tokens drawn at random", "results of calculations"), asked):
        rows, differences, best = results.summary(spans, found, names)
        shown[title] = {"conditions": rows, "differences": differences, "best_temperature": best}
        headers = {"all": f"NLL, {title}", "hard": "NLL, hardest 10 %"}
        print(f"\n{tables.shown(rows, headers | {'weight': 'mean w'}, 4)}\n")
        print(tables.shown(differences, headers, 4))
    everything = shown["tokens drawn at random"]["differences"]
    holds = {
        "helps": results.helps(everything),
        "helps_results": results.helps(shown["results of calculations"]["differences"]),
        "keeps_its_language": results.keeps_its_language(everything),
    }
    print(
        f"\n[ ]: 95 % interval, bootstrap over {args.test_texts} texts, differences paired; greedy thoughts. A gain counts "
        f"below the control,\nshuffled thoughts and w = 0 at once: {'it is there' if holds['helps'] else 'THERE IS NONE'} over all tokens, "
        f"{'it is there' if holds['helps_results'] else 'THERE IS NONE'} at the results. w = 0 at most\n"
        f"{results.LANGUAGE} above the control: {'yes' if holds['keeps_its_language'] else 'NO'}."
    )
    report.last_line(
        {**shown, **holds, "settings": settings, "seconds": time.perf_counter() - began}
    )
    return 0
