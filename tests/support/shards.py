"""Shards of made-up documents, in the formats that a stream reads."""

import json
import random
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec

WORDS = "the state of union is strong and people are well we meet today to speak work done before us"


def made_up(count: int, longest: int = 30, seed: int = 0) -> list[str]:
    """Texts of 3 to `longest` words, no two alike."""
    draw = random.Random(seed)
    return [f"{i} " + " ".join(draw.choices(WORDS.split(), k=draw.randint(3, longest))) for i in range(count)]


def write_shard(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    """Writes the rows in the format of the path's ending; gives the path back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(list(rows)), path, row_group_size=3)
    else:
        with fsspec.open(str(path), "wt", compression="infer", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def write_shards(folder: Path, texts: list[str], count: int = 4, ending: str = ".parquet") -> list[str]:
    """The texts in `count` shards of that ending, in order."""
    each = -(-len(texts) // count)
    return [
        write_shard(folder / f"part-{i}{ending}", [{"text": t} for t in texts[i * each : (i + 1) * each]])
        for i in range(count)
    ]


def documents(rows: Iterable[dict[str, list[int]]]) -> list[tuple[int, ...]]:
    """The documents of packed rows, cut where position_ids begin again."""
    found = []
    for row in rows:
        starts = [i for i, p in enumerate(row["position_ids"]) if p == 0] + [len(row["input_ids"])]
        found += [tuple(row["input_ids"][a:b]) for a, b in pairwise(starts)]
    return found
