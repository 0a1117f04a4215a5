"""Files of one JSON object a line: read whole, or added to by a run that a later one goes on with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")


def read(option: str, name: str) -> list[tuple[int, dict[str, Any]]]:
    """(number of its line, record) of a file. Raises ValueError, naming the option, for one that is missing,
    empty or no JSONL."""
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"{option} = {name!r}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} = {name!r}: is no UTF-8 text: {error}") from error
    records = []
    # JSON may hold what splitlines() takes for a line's end
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            json.dumps(record, ensure_ascii=False).encode()  # half a character cannot be written again
        except ValueError as error:
            raise ValueError(f"{option} = {name!r}: line {number} is no JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{option} = {name!r}: line {number} is no JSON object")
        records.append((number, record))
    if not records:
        raise ValueError(f"{option} = {name!r}: the file is empty")
    return records


def resume(output: str, what: str, take: Callable[[list[dict[str, Any]]], _T]) -> _T:
    """What `take` makes of the lines that a run before wrote to a file; a line that it could not finish is
    cut off. Raises ValueError, and touches nothing, for lines that are not `what` (take fails on them)."""
    path = Path(output)
    whole = path.read_bytes() if path.exists() else b""
    kept, newline, last = whole.rpartition(b"\n")
    try:
        lines = [json.loads(line) for line in kept.decode("utf-8").split("\n") if line.strip()]
        try:
            lines += [json.loads(last)] if last else []
        except ValueError:
            if not last.startswith(b'{"'):
                raise
            last = b""
        taken = take(lines)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"output = {output!r}: holds other lines than {what}: {error!r}") from error
    whole_lines = kept + newline + (last + b"\n" if last else b"")
    if whole_lines != whole:
        path.write_bytes(whole_lines)
    return taken
