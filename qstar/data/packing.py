"""Pack documents into rows, and rows into batches.

Rows carry position_ids that count from 0 in every document, so no document attends across its border.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qstar.layout import IGNORE


def encode(texts: Iterable[str], tokenizer) -> Iterator[list[int]]:
    """Yield the token ids of each text, with the tokenizer's own special tokens and its end-of-text token, if
    it has one. Raises ValueError for a text of fewer than 2 tokens."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text in texts:
        # a document longer than the model's context is cut into rows later: the length warning would mislead
        ids = tokenizer(text, verbose=False)["input_ids"]
        if len(ids) < 2:
            raise ValueError(f"text: {text[:40]!r} has {len(ids)} tokens, at least 2 are needed")
        yield ids if end and ids[-1:] == end else ids + end


def pack_rows(
    documents: Iterable[list[int]], span_length: int, draw: np.random.Generator | None = None
) -> dict[str, list[list[int]]]:
    """Pack spans of documents into rows: the longest first, each into the fullest row that has room (best-fit
    decreasing).

    A document is cut into spans of span_length tokens and a rest; with `draw` it gives only one span, which
    begins at a random token. Single tokens are left out: one alone predicts nothing.
    """
    spans: list[list[int]] = []
    for ids in documents:
        if draw is None:
            spans += (ids[first : first + span_length] for first in range(0, len(ids), span_length))
        else:
            first = int(draw.integers(max(len(ids) - span_length, 0) + 1))
            spans.append(ids[first : first + span_length])
    rows: dict[str, list[list[int]]] = {"input_ids": [], "position_ids": []}
    rooms: list[tuple[int, int]] = []  # sorted (tokens that a row has room for, the row)
    for span in sorted((s for s in spans if len(s) > 1), key=len, reverse=True):
        at = bisect_left(rooms, (len(span), -1))
        if at < len(rooms):
            room, row = rooms.pop(at)
        else:
            room, row = span_length, len(rows["input_ids"])
            for column in rows.values():
                column.append([])
        rows["input_ids"][row].extend(span)
        rows["position_ids"][row].extend(range(len(span)))
        if room - len(span) > 1:
            insort(rooms, (room - len(span), row))
    return rows


def text_rows(texts: list[str], tokenizer, span_length: int) -> list[dict[str, list[int]]]:
    """Turn texts into rows for `collate`; see `encode` and `pack_rows`."""
    packed = pack_rows(encode(texts, tokenizer), span_length)
    return [dict(zip(packed, values)) for values in zip(*packed.values())]


@dataclass(frozen=True)
class ShuffledBatches:
    """Batches of `collate` without end.

    The order of an epoch follows from seed and epoch alone, and the first `first` batches are skipped, so a
    run that resumes after so many sees what it would have seen. Rows that fill no batch wait for another
    epoch. Raises ValueError for a batch_size above the number of rows.
    """

    rows: list[dict[str, list[int]]]
    batch_size: int
    seed: int = 0
    first: int = 0

    def __post_init__(self):
        if not 1 <= self.batch_size <= len(self.rows):
            raise ValueError(
                f"batch_size = {self.batch_size}: must be in [1, {len(self.rows)}], the number of rows"
            )

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        epoch, at = divmod(self.first, len(self.rows) // self.batch_size)
        while True:
            source = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(len(self.rows), generator=source).split(self.batch_size)
            for chosen in order[at : len(self.rows) // self.batch_size]:
                yield collate([self.rows[i] for i in chosen.tolist()])
            epoch, at = epoch + 1, 0


def collate(rows: list[dict[str, list[int]]], length: int | None = None) -> dict[str, Tensor]:
    """Pad rows on the right: input_ids, position_ids, attention_mask, labels [B, T] int64; T is `length`, or
    the longest row's.

    Labels come from the mask, never from the padding's token id, so an end-of-text token that is also the
    padding token is learned. The first token of a document is no target: nothing predicts it, and a trainer
    that counts labels to weigh micro-batches must not count it. Rows may have labels of their own, and a
    think_mask (1: think after this token), if all of them do.
    """
    length = length or max(len(row["input_ids"]) for row in rows)
    names = [n for n in ("input_ids", "position_ids", "labels", "think_mask") if n in rows[0]]
    batch = {name: torch.zeros(len(rows), length, dtype=torch.long) for name in (*names, "attention_mask")}
    for i, row in enumerate(rows):
        tokens = len(row["input_ids"])
        for name in names:
            # torch.tensor would take several times as long to read a list
            batch[name][i, :tokens] = torch.from_numpy(np.asarray(row[name], np.int64))
        batch["attention_mask"][i, :tokens] = 1
    no_target = (batch["attention_mask"] == 0) | (batch["position_ids"] == 0)
    batch["labels"] = batch.get("labels", batch["input_ids"]).masked_fill(no_target, IGNORE)
    return batch


def left_padded(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Pad prompts on the left with id 0, since a tokenizer may have no padding token: input_ids and
    attention_mask [B, T]. Raises ValueError for a prompt without tokens."""
    if not all(prompts):
        raise ValueError("prompt: holds no token; each must hold at least one")
    length = max(map(len, prompts))
    input_ids = [[0] * (length - len(ids)) + ids for ids in prompts]
    mask = [[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts]
    return torch.tensor(input_ids), torch.tensor(mask)
