"""Run `qstar demo`: train an embedded tiny model in several conditions, compare them, show what it thinks."""

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg
from transformers.utils import logging

from qstar.cli.main import keep_freed_memory
from qstar.cli.options import parse_options
from qstar.config import QuietStarConfig
from qstar.demo import walk_training
from qstar.demo.town import CHANCE, STEPS
from qstar.option_checks import check_least
from qstar.reporting import tables


@dataclass
class DemoArguments:
    """Options of `qstar demo`."""

    seed: int = HfArg(default=0, help="Seed of the training text, its order and the thoughts.")
    training_steps: int = HfArg(default=50, help="Optimiser steps of every condition.")
    test_walks: int = HfArg(default=300, help="Unseen walks to test with.")
    output_dir: str = HfArg(default="outputs/demo", help="Folder for the model that learned to think.")
    processes: int | None = HfArg(
        default=None, help="Conditions that train at once, each on its share of the cores; default: 2."
    )

    def __post_init__(self) -> None:
        check_least(self, training_steps=1, test_walks=1, processes=1)


def conditions() -> dict[str, QuietStarConfig | None]:
    """Name what is trained, in the order of the table; the last one is the model that is kept."""
    return {
        "control: trained without thoughts": None,
        "no policy term": walk_training.thinking(policy_weight=0.0),
        **{f"full, {k} thought tokens": walk_training.thinking(k) for k in (0, 2, 4, STEPS)},
    }


def run(name: str, args: DemoArguments, progress: bool) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Train and test one condition: (its row of the table, examples of what the kept model says)."""
    since = time.perf_counter()
    task = walk_training.WalkTask.make(args.seed, args.training_steps, args.test_walks)
    config = conditions()[name]
    model = walk_training.train(task, config, args.seed, progress)
    row: dict[str, Any] = {"condition": name, "direct accuracy": walk_training.direct_accuracy(model, task)}
    if config is not None:
        row["thought length"] = config.thought_length
        row["useful thoughts"] = walk_training.useful_share(model, task)
        row["mixed NLL"] = walk_training.mixed_nll(model, task)
    shown = []
    if name == list(conditions())[-1]:
        shown = walk_training.examples(model, task)
        model.save_pretrained(args.output_dir)
        task.tokenizer.save_pretrained(args.output_dir)
    return row | {"seconds": time.perf_counter() - since}, shown


def run_all(args: DemoArguments) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Run every condition, several at once: (rows in the order of `conditions`, examples)."""
    names, cores = list(conditions()), os.cpu_count() or 1
    processes = args.processes or min(2, cores)
    if processes == 1:
        found = {}
        for number, name in enumerate(names, 1):
            print(f"{number}/{len(names)} {name}", flush=True)
            found[name] = run(name, args, progress=True)
    else:
        threads = max(1, cores // processes)
        # not forked: torch's threads do not survive it
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, context, _begin_process, (threads,)) as pool:
            # the longest first: they are the last of the table
            waiting = {pool.submit(run, name, args, False): name for name in reversed(names)}
            bar = tqdm(as_completed(waiting), total=len(names), desc="conditions")
            found = {waiting[done]: done.result() for done in bar}
    return [found[name][0] for name in names], found[names[-1]][1]


def _begin_process(threads: int) -> None:
    torch.set_num_threads(threads)
    keep_freed_memory()
    _be_quiet()


def _be_quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def main(argv: list[str]) -> int:
    (args,) = parse_options(DemoArguments, argv, prog="qstar demo")
    _be_quiet()
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
    start = walk_training.before(task, walk_training.thinking())
    rows: list[dict[str, Any]] = [
        {
            "condition": "before",
            "thought length": None,
            "direct accuracy": walk_training.direct_accuracy(start.base, task),
            "useful thoughts": walk_training.useful_share(start, task),
            "mixed NLL": walk_training.mixed_nll(start, task),
        }
    ]
    trained, shown = run_all(args)
    rows += trained

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
            **{name: getattr(args, name) for name in ("test_walks", "training_steps", "seed")},
            "seconds": time.perf_counter() - began,
        }
    )
    return 0
