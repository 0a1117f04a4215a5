"""Read a user's file of one JSON object a line."""

import json
from pathlib import Path
from typing import Any


def read(option: str, name: str) -> list[tuple[int, dict[str, Any]]]:
    """Return (line number, record) of every record of a file.

    Raises ValueError, naming the option, for a file that is missing, empty or not JSONL.
    """
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
