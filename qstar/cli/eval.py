"""`qstar eval`: does it think? One task, a model in every condition, beside its base and its controls."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from transformers import AutoTokenizer

from qstar.cli.eval_inputs import (
    DTYPES,
    ChainArguments,
    EvalArguments,
    TextArguments,
    contestants,
    read_task,
    reference_of,
)
from qstar.cli.options import parse_options, with_config_file
from qstar.evaluation import condition_tables
from qstar.evaluation.majority import MajorityVote
from qstar.evaluation.predictions import Thinking, pause_token
from qstar.evaluation.results import Results
from qstar.evaluation.run import Task, evaluate
from qstar.evaluation.statistics import RESAMPLES
from qstar.evaluation.text import SMOOTHED, PlainText, measured
from qstar.model import QuietStarForCausalLM
from qstar.reporting.benchmark_record import TableArguments, finish, machine


def main(argv: list[str]) -> int:
    types = (EvalArguments, TextArguments, ChainArguments, TableArguments)
    args, text, chain, output = parse_options(types, with_config_file(argv), prog="qstar eval")
    model = QuietStarForCausalLM.from_pretrained(args.model, dtype=DTYPES[args.dtype]).to(args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    task, settings, cut = read_task(args, text, chain, tokenizer, model)
    competing = contestants(args, task, [model])
    del model  # the list above has it, until its turn is over
    paused = any("pause" in contestant.conditions for contestant in competing)
    thinking = Thinking(args.thought_temperature, pause_token(tokenizer) if paused else None)
    results = Results(settings, args.output)
    evaluate(task, competing, results, args.batch_size, thinking, args.seed, progress=not output.json)

    # the model comes last in the tables
    names = [
        name for x in (*competing[1:], competing[0]) for way, name in x.conditions.items() if way != SMOOTHED
    ]
    figures = {name: results.of(name) for name in names}
    more: dict[str, Any] = {"questions": len(task.lengths), "truncated": cut}
    if isinstance(task, PlainText):
        reference = reference_of(args)
        found = measured(task.spans, figures, results.of(f"{reference}, smoothed"), reference)
        rows, differences = condition_tables.text_rows(found, names[-1], args.seed)
        more |= {"options": asdict(text), "reference": reference, "best_temperature": found.best}
        headers, columns = {"all": "NLL, all tokens", "hard": "NLL, hardest 10 %"}, {"weight": "mean w"}
    else:
        rows, differences = condition_tables.question_rows(figures, task.metrics, args.seed)
        more |= {"options": asdict(chain) if isinstance(task, MajorityVote) else {}}
        headers, columns = {name: name for name in task.metrics}, {}
    if not output.json:
        digits = 4 if isinstance(task, PlainText) else 3
        print(condition_tables.shown(rows, headers | columns, digits) + "\n")
        print(condition_tables.shown(differences, headers, 4) + "\n")
        print(_note(task, args))
    finish("eval", args, machine(args.device), rows, output, differences=differences, **more)
    return 0


def _note(task: Task, args: EvalArguments) -> str:
    """What a reader must know beside the table."""
    what = "texts" if isinstance(task, PlainText) else "questions"
    thoughts = (
        "greedy thoughts" if args.thought_temperature == 0 else f"thoughts at {args.thought_temperature:g}"
    )
    note = f"[ ]: 95 % interval, bootstrap over {what} ({RESAMPLES} draws), differences paired; {thoughts}."
    if isinstance(task, PlainText):
        note += (
            f"\nHard: tokens with the highest NLL of {reference_of(args)!r}. Whatever flattens a prediction "
            "helps them, a temperature alone too:\na gain there counts only beside a control, the shuffled "
            "thoughts and the best temperature, with all tokens next to it."
        )
    return note
