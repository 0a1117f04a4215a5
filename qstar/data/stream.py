"""Stream rows of data that is never held whole: shards read one after the other, packed window by window.

The order follows from the seed alone and a position is a few numbers, so a run resumes exactly where it was.
datasets.IterableDataset cannot: the buffer of its shuffle is not in its state.
"""

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, takewhile
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from qstar.data.packing import encode, pack_rows
from qstar.data.sources import DataArguments, records, shard_files
from qstar.option_checks import check_least

Row = dict[str, list[int]]
Packed = list[tuple[np.ndarray, np.ndarray]]  # input_ids and position_ids of each row, int32

WINDOW = 2**20  # characters: about a thousand rows of 256 tokens
KEPT_WINDOWS = 1024  # windows whose start is remembered: consumers fetch far fewer ahead
PASSED_OVER: Row = {"input_ids": [0], "position_ids": [0]}


class Position(NamedTuple):
    """A document: in which pass over the data, in which of its shuffled shards, and where in that shard."""

    epoch: int = 0
    shard: int = 0
    document: int = 0


class RowStream(IterableDataset):
    """Rows (input_ids, position_ids) without end, from Parquet or JSON-lines shards; see DataArguments.

    Every pass takes the shards in another order, one at a time. Documents of about `window` characters are
    packed (`pack_rows`) and their rows shuffled among themselves. Spans and order of a window follow from the
    seed and the window's position, so the rows are the same for any number of `workers`, the processes that
    tokenize windows (0: this process does). Memory is that of a few windows per worker, and of the longest
    document.

    held_out: rows of the first documents of the unshuffled data; texts equal to those are left out. Rows have
    more than talk_length tokens: others could not be scored after a thought.

    Raises ValueError, naming the file, for a source that is missing, mixed, unreadable, too small or without
    the fields asked for: from the constructor if the start of a file is wrong, else when it is read.
    """

    def __init__(
        self,
        arguments: DataArguments,
        tokenizer,
        talk_length: int,
        seed: int = 0,
        workers: int = 0,
        window: int = WINDOW,
    ):
        arguments.check(talk_length)
        self.arguments, self.seed, self.workers, self.window = arguments, seed, workers, window
        check_least(self, seed=0, workers=0, window=1)
        self.shards = shard_files(arguments)
        self._packer = _Packer(
            tokenizer, arguments.span_length, arguments.spans == "random", talk_length, seed
        )
        self._left_out: frozenset[str] = frozenset()
        self.held_out = self._hold_out()
        self._begin, self._offset, self._passed = Position(), 0, 0
        self._count_from(0)

    def __iter__(self) -> Iterator[Row]:
        if get_worker_info() is not None:
            raise ValueError("num_workers of the DataLoader: must be 0; a RowStream has `workers` of its own")
        self._count_from(0)
        for _ in range(self._passed):
            self._taken += 1
            yield PASSED_OVER
        skip = self._offset
        for position, rows in self._packed(self._begin):
            self._windows.append((self._taken - skip, position))
            for ids, positions in rows[skip:]:
                self._taken += 1
                yield _row(ids, positions)
            skip = max(skip - len(rows), 0)

    def state_dict(self, taken: int | None = None) -> dict[str, Any]:
        """Return the position after the first `taken` rows of this iteration, by default after all that were
        handed out; a loader that fetches ahead says how many were really used. Raises ValueError for a number
        of rows handed out too long ago or not yet."""
        taken = self._taken if taken is None else taken
        least = self._windows[0][0]
        if not least <= taken <= self._taken:
            raise ValueError(f"taken = {taken}: must be in [{least}, {self._taken}], rows handed out lately")
        first, position = next(window for window in reversed(self._windows) if window[0] <= taken)
        return {"position": list(position), "offset": taken - first} | self._order

    def load_state_dict(self, state: dict[str, Any], passed: int = 0) -> None:
        """Begin the next iteration there. passed: so many rows without text come first, for a trainer that
        asks again for all rows it has had, to drop them. Raises ValueError for the state of another
        stream."""
        for name, value in self._order.items():
            if state.get(name) != value:
                raise ValueError(f"{name} = {value!r}: the stream to resume had {state.get(name)!r}")
        self._begin, self._offset = Position(*state["position"]), state["offset"]
        self._passed = passed
        self._count_from(passed)

    @property
    def _order(self) -> dict[str, Any]:
        """What the order of the rows depends on, beside the texts and the tokenizer."""
        named = ("span_length", "spans", "held_out_rows")
        own = {"seed": self.seed, "shards": len(self.shards), "window": self.window}
        return own | {name: getattr(self.arguments, name) for name in named}

    def _count_from(self, taken: int) -> None:
        self._taken = taken
        begun = (
            self._passed - self._offset,
            self._begin,
        )  # (rows of this iteration before a window, its place)
        self._windows: deque[tuple[int, Position]] = deque([begun], KEPT_WINDOWS)

    def _packed(self, begin: Position) -> Iterator[tuple[Position, Packed]]:
        loader: DataLoader = DataLoader(
            self._packer,
            sampler=self._windows_from(begin),
            batch_size=None,
            num_workers=self.workers,
            collate_fn=tuple,  # which an item is already
            worker_init_fn=partial(_end_with, os.getpid()) if self.workers else None,
            generator=torch.Generator(),  # else it would draw from torch's, which thoughts draw from
        )
        for position, rows in loader:
            if isinstance(rows, ValueError):
                raise rows
            yield position, rows

    def _windows_from(self, begin: Position) -> Iterator[tuple[Position, list[str]]]:
        for epoch in count(begin.epoch):
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.shards))
            found, begun, size = False, begin, 0
            texts: list[str] = []
            for position, text in self._texts(order, begin if epoch == begin.epoch else Position(epoch)):
                if text not in self._left_out:
                    found, begun = True, begun if texts else position
                    texts.append(text)
                    size += len(text)
                if size >= self.window:
                    yield begun, texts
                    texts, size = [], 0
            if texts:
                yield begun, texts
            elif not found:
                return  # all documents are held out

    def _texts(self, order: Iterable[int], begin: Position) -> Iterator[tuple[Position, str]]:
        """Yield the documents of one pass, from `begin` on."""
        for shard, number in enumerate(order):
            if shard < begin.shard:
                continue
            path, first = self.shards[number], begin.document if shard == begin.shard else 0
            for document, record in enumerate(records(path, first, self.arguments.fields), first):
                try:
                    text = self.arguments.text_of(record)
                except ValueError as error:
                    raise ValueError(f"{error} (record {document + 1} of {path})") from error
                yield Position(begin.epoch, shard, document), text

    def _hold_out(self) -> list[Row]:
        wanted, length = self.arguments.held_out_rows, self.arguments.span_length
        texts: list[str] = []
        documents: list[list[int]] = []
        rows: Packed = []
        tokens = 0
        for _, text in self._texts(range(len(self.shards)), Position()):
            texts.append(text)
            documents += encode([text], self._packer.tokenizer)
            tokens += min(len(documents[-1]), length) if self._packer.draws else len(documents[-1])
            if tokens >= wanted * length:
                rows = self._packer.rows(documents, np.random.default_rng(self.seed))
                if len(rows) >= wanted:
                    break
        self._left_out = frozenset(texts)
        if len(rows) < wanted or not self._gives_rows():
            raise ValueError(
                f"held_out_rows = {wanted}: with span_length = {length} they leave nothing to train on, of "
                f"{len(texts)} documents with {tokens} tokens"
            )
        return [_row(*row) for row in rows[:wanted]]

    def _gives_rows(self) -> bool:
        one_pass = takewhile(lambda window: window[0].epoch == 0, self._windows_from(Position()))
        return any(map(self._packer.pack, one_pass))


@dataclass(frozen=True)
class _Packer(Dataset):
    """Turns windows of texts into rows, in a worker."""

    tokenizer: Any
    span_length: int
    draws: bool  # one random span of each document
    talk_length: int
    seed: int

    def __getitem__(self, window: tuple[Position, list[str]]) -> tuple[Position, Packed | ValueError]:
        try:
            return window[0], self.pack(window)
        except ValueError as error:
            return window[0], error  # raised in a worker, its message would hold a traceback

    def pack(self, window: tuple[Position, list[str]]) -> Packed:
        (epoch, shard, document), texts = window
        # document + 1: a trailing 0 would not change the seed
        draw = np.random.default_rng([self.seed, epoch, shard, document + 1])
        return self.rows(encode(texts, self.tokenizer), draw)

    def rows(self, documents: Iterable[list[int]], draw: np.random.Generator) -> Packed:
        packed = pack_rows(documents, self.span_length, draw if self.draws else None)
        rows = [
            (np.array(ids, np.int32), np.array(positions, np.int32))
            for ids, positions in zip(packed["input_ids"], packed["position_ids"])
            if len(ids) > self.talk_length
        ]
        return [rows[i] for i in draw.permutation(len(rows))]


def _row(ids: np.ndarray, positions: np.ndarray) -> Row:
    return {"input_ids": ids.tolist(), "position_ids": positions.tolist()}


def _end_with(parent: int, worker: int) -> None:
    """End this worker when its parent was killed: a window is more than a pipe holds, so it would wait for
    ever for the rest of one, or for a reader."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    Thread(target=watch, daemon=True).start()
