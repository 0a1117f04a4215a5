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
    records = _records(arguments)
    columns = records.column_names or list(next(iter(records)))

    def pack(batch: dict[str, list]) -> dict[str, list]:
        documents = [dict(zip(batch, values)) for values in zip(*batch.values())]
        texts = [document_text(d, arguments.text_field, arguments.template) for d in documents]
        return pack_rows(encode(texts, tokenizer), arguments.span_length)

    options = {} if arguments.streaming else {"desc": "tokenize", "load_from_cache_file": False}
    rows = records.map(pack, batched=True, remove_columns=columns, **options)
    if arguments.streaming:
        held_out = list(rows.take(arguments.held_out_rows))
        return rows.skip(arguments.held_out_rows).shuffle(seed=seed, buffer_size=1000), held_out
    longest = max((len(ids) for ids in rows["input_ids"]), default=0)
    if longest <= talk_length:
        raise ValueError(
            f"text: its longest row has {longest} tokens, talk_length = {talk_length} needs more"
        )
    if len(rows) <= arguments.held_out_rows:
        raise ValueError(
            f"held_out_rows = {arguments.held_out_rows}: the text has only {len(rows)} rows of span_length = "
            f"{arguments.span_length} tokens"
        )
    parts = rows.train_test_split(test_size=arguments.held_out_rows, seed=seed)
    return parts["train"], list(parts["test"])


def _records(arguments: DataArguments):
    import datasets

    if arguments.dataset:
        return datasets.load_dataset(
            arguments.dataset,
            arguments.dataset_config,
            split=arguments.dataset_split,
            streaming=arguments.streaming,
        )
    files = [Path(name) for name in arguments.text]
    for path in files:
        if not path.is_file():
            raise ValueError(f"text = {str(path)!r}: no such file")
        if not path.read_text(encoding="utf-8", errors="strict").strip():
            raise ValueError(f"text = {str(path)!r}: the file is empty")
    lines = {path.suffix == ".jsonl" for path in files}
    if len(lines) > 1:
        raise ValueError(f"text = {arguments.text}: give either .jsonl files or plain text, not both")
    kind = {"path": "json"} if lines == {True} else {"path": "text", "sample_by": "document"}
    return datasets.load_dataset(
        **kind, data_files=[str(p) for p in files], split="train", streaming=arguments.streaming
    )


def document_text(record: dict[str, Any], text_field: str, template: str | None) -> str:
    """The text of a record: one of its fields, or a template filled with several. Raises ValueError."""
    wanted = {name for _, name, _, _ in Formatter().parse(template) if name} if template else {text_field}
    missing = sorted(name for name in wanted if record.get(name) is None)
    if missing:
        option = "template" if template else "text_field"
        raise ValueError(f"{option}: a record has no {missing}; it has {sorted(record)}")
    text = template.format(**record) if template else record[text_field]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"text_field = {text_field!r}: a record holds no text there: {str(record)[:80]}")
    return text


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


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Right-padded batch: input_ids, position_ids, attention_mask, labels [B, T] int64.

    Labels come from the mask, never from the padding's token id: an end-of-text token that is also the
    padding token is learned.
    """
    length = max(len(row["input_ids"]) for row in rows)
    batch = {name: torch.zeros(len(rows), length, dtype=torch.long) for name in ("input_ids", "position_ids")}
    batch["attention_mask"] = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens = len(row["input_ids"])
        for name in ("input_ids", "position_ids"):
            batch[name][i, :tokens] = torch.tensor(row[name])
        batch["attention_mask"][i, :tokens] = 1
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE)
    return batch
