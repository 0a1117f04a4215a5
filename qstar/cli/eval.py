"""`qstar eval`: does it think? One task, a model in every condition, beside its base and its controls."""

from dataclasses import asdict
from typing import Any

from transformers import AutoTokenizer

from qstar.cli import eval_inputs
from qstar.cli.common_options import DTYPES
from qstar.cli.options import parse_options, with_config_file
from qstar.evaluation import condition_tables
from qstar.evaluation.majority import MajorityVote
from qstar.evaluation.predictions import ThoughtSampling, pause_token
from qstar.evaluation.results import Results
from qstar.evaluation.run import evaluate
from qstar.evaluation.statistics import RESAMPLES
from qstar.evaluation.text import SMOOTHED, PlainText, measured
from qstar.model import QuietStarForCausalLM
from qstar.reporting.benchmark_record import TableArguments, finish, machine
from qstar.reporting.tables import intervals

HARD_NOTE = """
Hard: tokens with the highest NLL of {!r}. Whatever flattens a prediction helps them, a temperature alone too:
a gain there counts only beside a control, the shuffled thoughts and the best temperature, with all tokens
next to it."""


def main(argv: list[str]) -> int:
    types = (eval_inputs.EvalArguments, eval_inputs.SpanArguments, eval_inputs.ChainArguments, TableArguments)
    args, text, chain, output = parse_options(types, with_config_file(argv), prog="qstar eval")
    model = QuietStarForCausalLM.from_pretrained(args.model, dtype=DTYPES[args.dtype]).to(args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    task, settings, cut = eval_inputs.read_task(args, text, chain, tokenizer, model)
    competing = eval_inputs.contestants(args, task, [model])
    del model  # the list above has it, until its turn is over
    paused = any("pause" in contestant.conditions for contestant in competing)
    thinking = ThoughtSampling(args.thought_temperature, pause_token(tokenizer) if paused else None)
    results = Results(settings, args.output)
    evaluate(task, competing, results, args.batch_size, thinking, args.seed, progress=not output.json)

    in_tables = (*competing[1:], competing[0])  # the model comes last
    names = [name for x in in_tables for way, name in x.conditions.items() if way != SMOOTHED]
    figures = {name: results.of(name) for name in names}
    more: dict[str, Any] = {"questions": len(task.lengths), "truncated": cut}
    thoughts = f"thoughts at {args.thought_temperature:g}" if args.thought_temperature else "greedy thoughts"
    note = f"[ ]: 95 % interval, bootstrap over {{}} ({RESAMPLES} draws), differences paired; {thoughts}."
    if isinstance(task, PlainText):
        reference = eval_inputs.reference_of(args)
        found = measured(task.items, figures, results.of(f"{reference}, smoothed"), reference)
        rows, differences = condition_tables.text_rows(found, names[-1], args.seed)
        more |= {"options": asdict(text), "reference": reference, "best_temperature": found.best}
        headers, columns = {"all": "NLL, all tokens", "hard": "NLL, hardest 10 %"}, {"weight": "mean w"}
        digits, note = 4, note.format("texts") + HARD_NOTE.format(reference)
    else:
        rows, differences = condition_tables.question_rows(figures, task.metrics, args.seed)
        more |= {"options": asdict(chain) if isinstance(task, MajorityVote) else {}}
        headers, columns = {name: name for name in task.metrics}, {}
        digits, note = 3, note.format("questions")
    if not output.json:
        print(intervals(rows, headers | columns, digits) + "\n")
        print(intervals(differences, headers, 4) + "\n")
        print(note)
    finish("eval", args, machine(args.device), rows, output, differences=differences, **more)
    return 0
