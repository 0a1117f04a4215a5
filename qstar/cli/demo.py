"""`qstar demo`: the whole story on an embedded tiny model, in minutes: train in several conditions, compare,
show."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import logging

from qstar.cli.options import parse_options
from qstar.demo import walk_training
from qstar.demo.town import CHANCE, STEPS
from qstar.reporting import tables


@dataclass
class DemoArguments:
    """Options of `qstar demo`."""

    seed: int = field(default=0, metadata={"help": "Seed of the training text, its order and the thoughts."})
    training_steps: int = field(default=50, metadata={"help": "Optimiser steps of every condition."})
    test_walks: int = field(default=300, metadata={"help": "Unseen walks to test with."})
    output_dir: str = field(
        default="outputs/demo", metadata={"help": "The model that learned to think is saved here."}
    )


def main(argv: list[str]) -> int:
    (args,) = parse_options(DemoArguments, argv, prog="qstar demo")
    for name in ("training_steps", "test_walks"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} = {getattr(args, name)}: must be at least 1")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    began = time.perf_counter()
    task = walk_training.WalkTask.make(args.seed, args.training_steps, args.test_walks)
    print(
        f"A tiny language model reads, for instance:\n  {task.test[0].text()}\n"
        f"It knows where each street leads, but not, in one step, where {STEPS} of them do "
        f"(chance {CHANCE:.3f}).\n"
        f"Once it read asides, of which one in five spelled the walk out:\n  "
        f"{task.test[0].text(task.test[0].useful_thought)}\n"
        f"Now it trains for {args.training_steps} steps on walks without any aside.\n",
        flush=True,
    )
    full = walk_training.thinking()
    start = walk_training.before(task, full)
    rows: list[dict[str, Any]] = [
        {
            "condition": "before",
            "thought length": None,
            "direct accuracy": walk_training.direct_accuracy(start.base, task),
            "useful thoughts": walk_training.useful_share(start, task),
            "mixed NLL": walk_training.mixed_nll(start, task),
        }
    ]
    conditions = [
        ("control: trained without thoughts", None),
        ("no policy term", walk_training.thinking(policy_weight=0.0)),
        *((f"full, {k} thought tokens", walk_training.thinking(k)) for k in (0, 2, 4)),
        (f"full, {STEPS} thought tokens", full),
    ]
    for number, (name, config) in enumerate(conditions, 1):
        print(f"{number}/{len(conditions)} {name}", flush=True)
        since = time.perf_counter()
        model = walk_training.train(task, config, args.seed)
        row: dict[str, Any] = {
            "condition": name,
            "direct accuracy": walk_training.direct_accuracy(model, task),
        }
        if config is not None:
            row["thought length"] = config.thought_length
            row["useful thoughts"] = walk_training.useful_share(model, task)
            row["mixed NLL"] = walk_training.mixed_nll(model, task)
        rows.append(row | {"seconds": time.perf_counter() - since})
    shown = walk_training.examples(model, task)
    model.save_pretrained(args.output_dir)
    task.tokenizer.save_pretrained(args.output_dir)

    print("\n" + tables.table(rows, digits=3))
    print(f"({args.test_walks} unseen walks; chance {CHANCE:.3f}; NLL in nats per token, greedy thoughts)\n")
    for example in shown:
        print(
            f"{example['question']} [{example['thought']}] {example['answer']}   (right: {example['right']})"
        )
    print(
        f"\nThe model that thinks is in {args.output_dir}; try\n  qstar generate --model {args.output_dir} "
        f"--prompt {task.test[3 % args.test_walks].question!r} --max_new_tokens 2 --show_thoughts"
    )
    by_length = {row["thought length"]: row["direct accuracy"] for row in rows if "full" in row["condition"]}
    tables.last_line(
        {
            "direct_accuracy_before": rows[0]["direct accuracy"],
            "direct_accuracy_control": rows[1]["direct accuracy"],
            "direct_accuracy_no_policy": rows[2]["direct accuracy"],
            "direct_accuracy_after": rows[-1]["direct accuracy"],
            "chance": CHANCE,
            "useful_share_before": rows[0]["useful thoughts"],
            "useful_share_no_policy": rows[2]["useful thoughts"],
            "useful_share_after": rows[-1]["useful thoughts"],
            "accuracy_by_thought_length": by_length,
            "mixed_nll_before": rows[0]["mixed NLL"],
            "mixed_nll_after": rows[-1]["mixed NLL"],
            "test_walks": args.test_walks,
            "training_steps": args.training_steps,
            "seed": args.seed,
            "seconds": time.perf_counter() - began,
        }
    )
    return 0
