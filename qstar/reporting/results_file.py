"""Keep the results of a run as JSON lines, so that a later run goes on where it stopped."""

import json
from collections.abc import Callable, Collection, Hashable
from pathlib import Path
from typing import Any

from qstar.option_checks import check_folder

Row = dict[str, Any]


class ResultsFile:
    """Rows of results by key: in memory and, with a path, as lines of a file that a later run reads again.

    key: takes a row to what tells it from the others; of two rows with one key the later counts.
    columns: what every row has besides its key. settings: what all runs of a file must agree in; they are
    its first line, {"settings": ...}. None: the file has no such line.

    A last line that a crash cut short is removed. Raises ValueError, and touches nothing, for a file with
    other settings or with rows that lack the key or a column (the message calls the right rows `what`), and
    for a path in a folder that does not exist.
    """

    def __init__(
        self,
        path: str | Path | None,
        what: str,
        key: Callable[[Row], Hashable],
        columns: Collection[str] = (),
        settings: Row | None = None,
    ):
        self._path = None if path is None else Path(path)
        self._key = key
        self._rows: dict[Hashable, Row] = {}
        if self._path is None:
            return
        check_folder("output", self._path)
        content = self._path.read_bytes() if self._path.exists() else b""
        try:
            lines, mended = _parsed(content)
            before = dict(lines.pop(0)["settings"]) if lines and settings is not None else None
            for row in lines:
                if missing := set(columns) - row.keys():
                    raise ValueError(f"no {', '.join(sorted(missing))} in {row}")
                self._rows[key(row)] = row
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"output = {str(path)!r}: holds other lines than {what}: {error!r}") from error
        if settings is not None:
            settings = json.loads(json.dumps(settings))
            if before is None:
                mended = _line({"settings": settings})
            elif before != settings:
                other = sorted(n for n in {*before, *settings} if before.get(n) != settings.get(n))
                raise ValueError(f"output = {str(path)!r}: is of a run with other {', '.join(other)}")
        if mended != content:
            self._path.write_bytes(mended)

    @property
    def rows(self) -> list[Row]:
        """The rows in the order in which they were added."""
        return list(self._rows.values())

    def __contains__(self, key: Hashable) -> bool:
        return key in self._rows

    def get(self, key: Hashable) -> Row | None:
        return self._rows.get(key)

    def add(self, row: Row) -> None:
        """Keep a row and write its line; do nothing where there is a row with its key."""
        key = self._key(row)
        if key in self._rows:
            return
        self._rows[key] = row
        if self._path is not None:
            with self._path.open("ab") as file:
                file.write(_line(row))


def _line(row: Row) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


def _parsed(content: bytes) -> tuple[list[Row], bytes]:
    """Return the rows of a file and its content without a last line that was cut short."""
    whole, newline, last = content.rpartition(b"\n")
    lines = [json.loads(line) for line in whole.decode("utf-8").split("\n") if line.strip()]
    try:
        lines += [json.loads(last)] if last else []
    except ValueError:
        if not last.startswith(b'{"'[: len(last)]):
            raise
        last = b""
    if not all(isinstance(line, dict) for line in lines):
        raise ValueError("a line is no JSON object")
    return lines, whole + newline + (last + b"\n" if last else b"")
