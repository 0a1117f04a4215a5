"""Run `qstar demo`: train an embedded tiny model in several conditions, compare them, show what it thinks."""

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from qstar.cli.main import keep_freed_memory
from qstar.cli.options import parse_options
from qstar.demo.town import CHANCE, STEPS, walks
from qstar.option_checks import check_least
from qstar.reporting import tables

BEFORE = "before"
# what a condition changes in the demo's settings of the method; None: it does not think
TRAINED: dict[str, dict[str, Any] | None] = {
    "control: trained without thoughts": None,
    "no policy term": {"policy_weight": 0.0},
    **{f"full, {k} thought tokens": {"thought_length": k} for k in (0, 2, 4, STEPS)},
}
NAMES = [BEFORE, *TRAINED]  # in the order of the table; the last one is the model that is kept
Result = tuple[dict[str, Any], list[dict[str, str]]]  # a row of the table, examples of what the model says


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


def run(name: str, args: DemoArguments, progress: bool) -> Result:
    """Train one condition, unless it is `BEFORE`, and test it; examples come with the last one alone."""
    # the Trainer takes seconds to import, which a process that hands all work to others does without
    from transformers.utils import logging

    from qstar.demo import walk_training

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    since = time.perf_counter()
    task = walk_training.WalkTask.make(args.seed, args.training_steps, args.test_walks)
    if name == BEFORE:
        start = walk_training.before(task, walk_training.thinking())
        row = {
            "condition": name,
            "thought length": None,
            "direct accuracy": walk_training.direct_accuracy(start.base, task),
            "useful thoughts": walk_training.useful_share(start, task),
            "mixed NLL": walk_training.mixed_nll(start, task),
        }
        return row, []
    changes = TRAINED[name]
    config = None if changes is None else walk_training.thinking(**changes)
    model = walk_training.train(task, config, args.seed, progress)
    row = {"condition": name, "direct accuracy": walk_training.direct_accuracy(model, task)}
    if config is not None:
        row["thought length"] = config.thought_length
        row["useful thoughts"] = walk_training.useful_share(model, task)
        row["mixed NLL"] = walk_training.mixed_nll(model, task)
    shown = []
    if name == NAMES[-1]:
        shown = walk_training.examples(model, task)
        model.save_pretrained(args.output_dir)
        task.tokenizer.save_pretrained(args.output_dir)
    return row | {"seconds": time.perf_counter() - since}, shown


def run_all(args: DemoArguments) -> dict[str, Result]:
    """Run every condition, several at once where there are cores."""
    cores = os.cpu_count() or 1
    processes = args.processes or min(2, cores)
    if processes == 1:
        found = {}
        for number, name in enumerate(NAMES):
            print(f"{number}/{len(TRAINED)} {name}", flush=True)
            found[name] = run(name, args, progress=True)
        return found
    context = multiprocessing.get_context("spawn")  # not forked: torch's threads do not survive it
    with ProcessPoolExecutor(processes, context, _begin_process, (max(1, cores // processes),)) as pool:
        # the longest first: they are the last of the table
        waiting = {pool.submit(run, name, args, False): name for name in reversed(NAMES)}
        bar = tqdm(as_completed(waiting), total=len(NAMES), desc="conditions")
        return {waiting[done]: done.result() for done in bar}


def _begin_process(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    keep_freed_memory()


def main(argv: list[str]) -> int:
    (args,) = parse_options(DemoArguments, argv, prog="qstar demo")
    began = time.perf_counter()
    test = walks(args.test_walks, seed="test", held_out=True)
    print(
        f"A tiny language model reads, for instance:\n  {test[0].text()}\n"
        f"It knows where each street leads, but not, in one step, where {STEPS} of them do "
        f"(chance {CHANCE:.3f}).\n"
        f"Once it read asides, of which one in five spelled the walk out:\n  "
        f"{test[0].text(test[0].useful_thought)}\n"
        f"Now it trains for {args.training_steps} steps on walks without any aside.\n",
        flush=True,
    )
    found = run_all(args)
    rows = [found[name][0] for name in NAMES]
    shown = found[NAMES[-1]][1]

    print("\n" + tables.table(rows, digits=3))
    print(f"({args.test_walks} unseen walks; chance {CHANCE:.3f}; NLL in nats per token, greedy thoughts)\n")
    for example in shown:
        print(
            f"{example['question']} [{example['thought']}] {example['answer']}   (right: {example['right']})"
        )
    print(
        f"\nThe model that thinks is in {args.output_dir}; try\n  qstar generate --model {args.output_dir} "
        f"--prompt {test[3 % args.test_walks].question!r} --max_new_tokens 2 --show_thoughts"
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
