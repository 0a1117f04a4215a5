"""Turn text into batches: files or any Hugging Face data set -> packed rows -> padded batches."""

from qstar.data.load import load_records, load_rows
from qstar.data.packing import ShuffledBatches, collate, encode, left_padded, pack_rows, text_rows
from qstar.data.sources import DataArguments, document_text, read_text
from qstar.data.stream import RowStream

__all__ = [
    "DataArguments",
    "RowStream",
    "ShuffledBatches",
    "collate",
    "document_text",
    "encode",
    "left_padded",
    "load_records",
    "load_rows",
    "pack_rows",
    "read_text",
    "text_rows",
]
