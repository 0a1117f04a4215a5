"""Text to batches: files, JSONL or any Hugging Face dataset -> rows of packed documents -> padded batches.

Rows carry position_ids that count from 0 in every document, so no document attends across its border.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

import torch
from torch import Tensor

from qstar.layout import IGNORE


@dataclass
class DataArguments:
    """Where the text comes from; exactly one of `text` and `dataset`."""

    text: list[str] = field(
        default_factory=list,
        metadata={"help": "Files: .jsonl has a document a line, any other file is one document."},
    )
    dataset: str | None = field(default=None, metadata={"help": "Anything that datasets.load_dataset reads."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration name."})
    dataset_split: str = field(default="train", metadata={"help": "Its split."})
    streaming: bool = field(default=False, metadata={"help": "Read the data set as a stream, keep nothing."})
    text_field: str = field(default="text", metadata={"help": "Field of a record that holds the text."})
    template: str | None = field(
        default=None, metadata={"help": "Text of a record from its fields, e.g. 'Q: {question} A: {answer}'."}
    )
    span_length: int = field(default=256, metadata={"help": "Tokens in a row; longer documents are cut."})
    held_out_rows: int = field(
        default=16, metadata={"help": "Rows kept from training, for the before/after table."}
    )


def load_rows(arguments: DataArguments, tokenizer, talk_length: int, seed: int = 0) -> tuple[Any, list[dict]]:
    """(training rows as a datasets.Dataset or IterableDataset, held-out rows); a row has input_ids,
    position_ids.

    Raises ValueError for a source that is missing, empty or too short, naming it.
    """
    for name, least in (("span_length", talk_length + 2), ("held_out_rows", 1)):
        if getattr(arguments, name) < least:
            raise ValueError(f"{name} = {getattr(arguments, name)}: must be at least {least}")
    if bool(arguments.text) == bool(arguments.dataset):
        raise ValueError(
            f"text = {arguments.text}, dataset = {arguments.dataset!r}: give exactly one of them"
        )
    records = load_records(arguments)
    columns = records.column_names or list(next(iter(records), ()))
    if not columns:
        raise ValueError(f"{_source(arguments)}: holds no record")

    def pack(batch: dict[str, list]) -> dict[str, list]:
        documents = [dict(zip(batch, values)) for values in zip(*batch.values())]
        texts = [document_text(d, arguments.text_field, arguments.template) for d in documents]
        return pack_rows(encode(texts, tokenizer), arguments.span_length)

    options = {} if arguments.streaming else {"desc": "tokenize", "load_from_cache_file": False}
    rows = records.map(pack, batched=True, remove_columns=columns, **options)
    # a batch of such rows alone, the end of a text for instance, could not be scored after a thought
    if arguments.streaming:
        rows = rows.filter(lambda row: len(row["input_ids"]) > talk_length)
        first = list(rows.take(arguments.held_out_rows + 1))
        _check_enough(len(first), arguments)
        return rows.skip(arguments.held_out_rows).shuffle(seed=seed, buffer_size=1000), first[:-1]
    lengths = [len(ids) for ids in rows["input_ids"]]
    longest = max(lengths, default=0)
    if longest <= talk_length:
        raise ValueError(
            f"text: its longest row has {longest} tokens, talk_length = {talk_length} needs more"
        )
    rows = rows.select([i for i, length in enumerate(lengths) if length > talk_length])
    _check_enough(len(rows), arguments)
    parts = rows.train_test_split(test_size=arguments.held_out_rows, seed=seed)
    return parts["train"], list(parts["test"])


def _source(arguments: DataArguments) -> str:
    return f"dataset = {arguments.dataset!r}" if arguments.dataset else f"text = {arguments.text}"


def _check_enough(rows: int, arguments: DataArguments) -> None:
    if rows <= arguments.held_out_rows:
        raise ValueError(
            f"held_out_rows = {arguments.held_out_rows}: the text has only {rows} rows of span_length = "
            f"{arguments.span_length} tokens"
        )


def load_records(arguments: DataArguments):
    """The records of a source as a datasets.Dataset or IterableDataset. Raises ValueError."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{_source(arguments)}: reading it needs the package datasets; pip install 'qstar[eval]'"
        ) from error

    options: dict[str, Any] = {"path": arguments.dataset, "name": arguments.dataset_config}
    if not arguments.dataset:
        _check_files(arguments.text)
        lines = {Path(name).suffix == ".jsonl" for name in arguments.text}
        if len(lines) > 1:
            raise ValueError(f"text = {arguments.text}: give either .jsonl files or plain text, not both")
        options = {"path": "json"} if lines == {True} else {"path": "text", "sample_by": "document"}
        options["data_files"] = list(arguments.text)
    try:
        return datasets.load_dataset(
            **options,
            split=arguments.dataset_split if arguments.dataset else "train",
            streaming=arguments.streaming,
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"{_source(arguments)}: cannot be read: {error.__cause__ or error}") from error


def _check_files(names: list[str]) -> None:
    for name in names:
        if not Path(name).is_file():
            raise ValueError(f"text = {name!r}: no such file")
        try:
            with Path(name).open(encoding="utf-8") as file:
                if not any(line.strip() for line in file):  # stops at the first line that holds anything
                    raise ValueError(f"text = {name!r}: the file is empty")
        except UnicodeDecodeError as error:
            raise ValueError(f"text = {name!r}: is no UTF-8 text: {error}") from error


def document_text(record: dict[str, Any], text_field: str, template: str | None) -> str:
    """The text of a record: one of its fields, or a template filled with several. Raises ValueError."""
    wanted = _fields(template) if template else {text_field}
    missing = sorted(name for name in wanted if record.get(name) is None)
    if missing:
        option = "template" if template else "text_field"
        raise ValueError(f"{option}: a record has no {missing}; it has {sorted(record)}")
    text = template.format(**record) if template else record[text_field]
    if not isinstance(text, str) or not text.strip():
        option = f"template = {template!r}" if template else f"text_field = {text_field!r}"
        raise ValueError(f"{option}: a record holds no text there: {str(record)[:80]}")
    return text


def _fields(template: str) -> set[str]:
    """The fields that a template names."""
    try:
        names = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"template = {template!r}: {error}") from error
    if not names or any(not name or name.isdigit() for name in names):
        raise ValueError(f"template = {template!r}: must name fields of a record in braces, as {{question}}")
    return names


def encode(texts: list[str], tokenizer) -> Iterator[list[int]]:
    """Token ids of each text, with the tokenizer's own special tokens and its end-of-text token, if it has
    one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text in texts:
        # a document longer than the model's context is cut into rows later: the length warning would mislead
        ids = tokenizer(text, verbose=False)["input_ids"]
        if len(ids) < 2:
            raise ValueError(f"text: {text[:40]!r} has {len(ids)} tokens, at least 2 are needed")
        yield ids if end and ids[-1:] == end else ids + end


def pack_rows(documents: Iterator[list[int]], span_length: int) -> dict[str, list[list[int]]]:
    """Cut documents into spans of at most span_length tokens and fill rows with them, in order."""
    rows: dict[str, list[list[int]]] = {"input_ids": [], "position_ids": []}
    for ids in documents:
        for first in range(0, len(ids), span_length):
            span = ids[first : first + span_length]
            if len(span) < 2:  # one token alone predicts nothing
                continue
            fits = rows["input_ids"] and len(rows["input_ids"][-1]) + len(span) <= span_length
            if not fits:
                for column in rows.values():
                    column.append([])
            rows["input_ids"][-1].extend(span)
            rows["position_ids"][-1].extend(range(len(span)))
    return rows


def text_rows(texts: list[str], tokenizer, span_length: int) -> list[dict[str, list[int]]]:
    """Texts that are at hand as rows for `collate`; see `encode` and `pack_rows`."""
    packed = pack_rows(encode(texts, tokenizer), span_length)
    return [dict(zip(packed, values)) for values in zip(*packed.values())]


@dataclass(frozen=True)
class ShuffledBatches:
    """Batches of `collate` without end. The order of an epoch follows from seed and epoch alone, and the
    first `first` batches are passed over: a run that resumes after so many sees what it would have seen. Rows
    that fill no batch wait for another epoch. Raises ValueError for fewer rows than a batch has."""

    rows: list[dict[str, list[int]]]
    batch_size: int
    seed: int = 0
    first: int = 0

    def __post_init__(self):
        if not 1 <= self.batch_size <= len(self.rows):
            raise ValueError(f"batch_size = {self.batch_size}: must be in [1, {len(self.rows)}], the rows")

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        epoch, at = divmod(self.first, len(self.rows) // self.batch_size)
        while True:
            source = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(len(self.rows), generator=source).split(self.batch_size)
            for chosen in order[at : len(self.rows) // self.batch_size]:
                yield collate([self.rows[i] for i in chosen.tolist()])
            epoch, at = epoch + 1, 0


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Right-padded batch: input_ids, position_ids, attention_mask, labels [B, T] int64.

    Labels come from the mask, never from the padding's token id: an end-of-text token that is also the
    padding token is learned. The first token of a document is no target: nothing predicts it, and a trainer
    that counts labels to weigh micro-batches must not count it. Rows may bring labels of their own, and a
    think_mask (1: think after this token), where all of them do.
    """
    length = max(len(row["input_ids"]) for row in rows)
    names = [n for n in ("input_ids", "position_ids", "labels", "think_mask") if n in rows[0]]
    batch = {name: torch.zeros(len(rows), length, dtype=torch.long) for name in (*names, "attention_mask")}
    for i, row in enumerate(rows):
        tokens = len(row["input_ids"])
        for name in names:
            batch[name][i, :tokens] = torch.tensor(row[name])
        batch["attention_mask"][i, :tokens] = 1
    no_target = (batch["attention_mask"] == 0) | (batch["position_ids"] == 0)
    batch["labels"] = batch.get("labels", batch["input_ids"]).masked_fill(no_target, IGNORE)
    return batch


def left_padded(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask) [B, T], padded on the left; a tokenizer may know no padding token."""
    if not all(prompts):
        raise ValueError("prompt: holds no token; each must hold at least one")
    length = max(map(len, prompts))
    input_ids = [[0] * (length - len(ids)) + ids for ids in prompts]
    mask = [[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts]
    return torch.tensor(input_ids), torch.tensor(mask)
