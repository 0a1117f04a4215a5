"""Files of prompts and of answers, for `qstar generate`: JSONL, a record a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_records(name: str) -> list[dict[str, Any]]:
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"input = {name!r}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"input = {name!r}: is no UTF-8 text: {error}") from error
    records = []
    for number, line in enumerate(
        text.split("\n"), 1
    ):  # JSON may hold what splitlines() takes for a line's end
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            json.dumps(record, ensure_ascii=False).encode()  # half a character cannot be written again
        except ValueError as error:
            raise ValueError(f"input = {name!r}: line {number} is no JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise ValueError(f"input = {name!r}: line {number} has no text `prompt`")
        records.append(record)
    if not records:
        raise ValueError(f"input = {name!r}: the file is empty")
    return records


def done_before(output: str) -> dict[int, dict]:
    """The answers that a run before wrote, by their index; a line that it could not finish is cut off. Raises
    ValueError, and touches nothing, for a file that holds anything else."""
    path = Path(output)
    whole = path.read_bytes() if path.exists() else b""
    kept, newline, last = whole.rpartition(b"\n")
    try:
        answers = [json.loads(line) for line in kept.decode("utf-8").split("\n") if line.strip()]
        try:
            answers += [json.loads(last)] if last else []
        except ValueError:
            if not last.startswith(b'{"'):
                raise
            last = b""
        done = {answer["index"]: answer for answer in answers if isinstance(answer["text"], str)}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"output = {output!r}: holds other lines than answers: {error!r}") from error
    whole_lines = kept + newline + (last + b"\n" if last else b"")
    if whole_lines != whole:
        path.write_bytes(whole_lines)
    return done


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
