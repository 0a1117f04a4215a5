"""Load text as rows to train on and rows to measure with, held whole or as a stream."""

from typing import Any

import numpy as np

from qstar.data.packing import encode, pack_rows
from qstar.data.sources import DataArguments, find_files, import_datasets, kind_of, records
from qstar.data.stream import RowStream


def load_rows(
    arguments: DataArguments, tokenizer, talk_length: int, seed: int = 0, workers: int = 0
) -> tuple[Any, list[dict]]:
    """Return training rows and held-out rows; a row has input_ids and position_ids.

    The training rows are a datasets.Dataset, or a RowStream with so many workers. Raises ValueError, naming
    the source, if it is missing, empty or too short.
    """
    if arguments.streaming:
        stream = RowStream(arguments, tokenizer, talk_length, seed, workers)
        return stream, stream.held_out
    arguments.check(talk_length)
    given = load_records(arguments)
    if not given.column_names:
        raise ValueError(f"{arguments.source}: holds no record")

    def pack(batch: dict[str, list], numbers: list[int]) -> dict[str, list]:
        documents = [dict(zip(batch, values)) for values in zip(*batch.values())]
        ids = encode([arguments.text_of(document) for document in documents], tokenizer)
        draw = np.random.default_rng([seed, numbers[0]]) if arguments.spans == "random" else None
        return pack_rows(ids, arguments.span_length, draw)

    options = {"desc": "tokenize", "load_from_cache_file": False, "remove_columns": given.column_names}
    rows = given.map(pack, batched=True, with_indices=True, **options)
    lengths = [len(ids) for ids in rows["input_ids"]]
    longest = max(lengths, default=0)
    if longest <= talk_length:
        raise ValueError(
            f"text: its longest row has {longest} tokens, talk_length = {talk_length} needs more"
        )
    # a batch of shorter rows alone, the end of a text for instance, could not be scored after a thought
    rows = rows.select([i for i, length in enumerate(lengths) if length > talk_length])
    if len(rows) <= arguments.held_out_rows:
        raise ValueError(
            f"held_out_rows = {arguments.held_out_rows}: the text has only {len(rows)} rows of span_length = "
            f"{arguments.span_length} tokens"
        )
    parts = rows.train_test_split(test_size=arguments.held_out_rows, seed=seed)
    return parts["train"], list(parts["test"])


def load_records(arguments: DataArguments):
    """Load the records of a source as a datasets.Dataset. Raises ValueError for files that cannot be read."""
    datasets = import_datasets(arguments)
    options: dict[str, Any] = {"path": arguments.dataset, "name": arguments.dataset_config}
    files: list[str] = []
    if not arguments.dataset:
        files = find_files(arguments.text)
        options = {"path": kind_of(files), "data_files": files}
        if options["path"] == "text":
            options["sample_by"] = "document"
    try:
        return datasets.load_dataset(
            **options, split=arguments.dataset_split if arguments.dataset else "train"
        )
    except datasets.exceptions.DatasetGenerationError as error:
        for file in files:
            for _ in records(file):  # raises for the broken one, naming it
                pass
        raise ValueError(f"{arguments.source}: cannot be read: {error.__cause__ or error}") from error
