"""Files of prompts and of answers, for `qstar generate`: JSONL, a record a line."""

from operator import itemgetter
from typing import Any

from qstar.reporting import jsonl
from qstar.reporting.results_file import ResultsFile


def read_records(name: str) -> list[dict[str, Any]]:
    records = jsonl.read("input", name)
    for number, record in records:
        if not isinstance(record.get("prompt"), str):
            raise ValueError(f"input = {name!r}: line {number} has no text `prompt`")
    return [record for _, record in records]


def answers_file(output: str) -> ResultsFile:
    """Open the file of answers, by the index of their prompt, with those that an earlier run wrote.

    Raises ValueError, and touches nothing, for a file that holds anything else.
    """
    return ResultsFile(output, "answers", itemgetter("index"), ("text",))


def check_lengths(model, tokenizer, records: list[dict], args: Any) -> None:
    """Raises ValueError for a prompt of the file that is too long, before any work."""
    from qstar.supported import context_length

    context = context_length(model.config)
    if context is None or args.truncate_prompt:
        return
    k = model.quiet_star.thought_length if args.thought_length is None else args.thought_length
    slots = 0 if args.think == "never" else k + 2
    for i, record in enumerate(records):
        longest = len(tokenizer(record["prompt"])["input_ids"]) + args.max_new_tokens - 1 + slots
        if longest > context:
            raise ValueError(
                f"input = {args.input!r}: prompt {i} ({record['prompt'][:30]!r}) needs {longest} positions, "
                f"more than the model's context of {context}"
            )
