"""Files of one JSON object a line: read whole, or added to by a run that a later one goes on with."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
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


class Kept:
    """Lines that a run adds to a file and a later one goes on with. Their `key` tells them apart, and they
    have all of `names` besides; the file's first line has the settings.

    Raises ValueError for a file that holds others than `what`, or is of a run with other settings.
    """

    def __init__(
        self, settings: dict[str, Any], output: Path, what: str, key: tuple[str, ...], names: Collection[str]
    ):
        self.rows: list[dict[str, Any]] = []
        self._output, self._key, self._names = output, key, names
        settings = json.loads(json.dumps(settings))
        before = resume(str(output), what, self._take)
        if before is None:
            self._write({"settings": settings})
        elif before != settings:
            other = sorted(n for n in {*before, *settings} if before.get(n) != settings.get(n))
            raise ValueError(f"output = {str(output)!r}: is of a run with other {', '.join(other)}")

    def _take(self, lines: list[dict[str, Any]]) -> dict[str, Any] | None:
        self.rows = [{name: line[name] for name in (*self._key, *self._names)} | line for line in lines[1:]]
        return lines[0]["settings"] if lines else None

    def _write(self, line: dict[str, Any]) -> None:
        with self._output.open("a", encoding="utf-8") as file:
            print(json.dumps(line, ensure_ascii=False), file=file)

    def has(self, *key: Any) -> bool:
        return any(tuple(row[name] for name in self._key) == key for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """A line that a run before has written already is not written again."""
        if not self.has(*(row[name] for name in self._key)):
            self.rows.append(row)
            self._write(row)
