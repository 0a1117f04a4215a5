"""Find where text comes from: files of documents, their records, and the text of a record."""

import json
import lzma
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from glob import glob
from itertools import islice
from pathlib import Path, PurePosixPath
from string import Formatter
from typing import IO, Any

from transformers.hf_argparser import HfArg

from qstar.option_checks import check_choice, check_least

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}
SPANS = ("all", "random")


@dataclass
class DataArguments:
    """Where the text comes from; exactly one of `text` and `dataset`."""

    text: list[str] = field(
        default_factory=list,
        metadata={"help": "Files, folders or patterns: .parquet (a document a row), .jsonl (a line), .txt."},
    )
    dataset: str | None = HfArg(default=None, help="Any data set that datasets.load_dataset reads.")
    dataset_config: str | None = HfArg(default=None, help="Configuration of the data set.")
    dataset_split: str = HfArg(default="train", help="Split of the data set.")
    streaming: bool = HfArg(
        default=False, help="Read Parquet or JSON-lines shards as an endless stream, in constant memory."
    )
    text_field: str = HfArg(default="text", help="Field of a record that holds the text.")
    template: str | None = HfArg(
        default=None, help="Text of a record from its fields, e.g. 'Q: {question} A: {answer}'."
    )
    span_length: int = HfArg(default=256, help="Tokens in a row; longer documents are cut.")
    spans: str = HfArg(
        default="all",
        help="all: every span of a long document; random: one, from a random token on, as in the paper.",
    )
    held_out_rows: int = HfArg(default=16, help="Rows kept from training, for the before/after table.")

    def check(self, talk_length: int) -> None:
        """Raise ValueError for an option out of range, with talk_length talk tokens."""
        check_least(self, span_length=talk_length + 2, held_out_rows=1)
        check_choice(self, spans=SPANS)
        if bool(self.text) == bool(self.dataset):
            raise ValueError(f"text = {self.text}, dataset = {self.dataset!r}: give exactly one of them")

    @property
    def source(self) -> str:
        """The source as errors name it."""
        return f"dataset = {self.dataset!r}" if self.dataset else f"text = {self.text}"

    @property
    def fields(self) -> list[str]:
        """The fields that a record must have. Raises ValueError for a template that names none."""
        return sorted(_fields(self.template)) if self.template else [self.text_field]

    def text_of(self, record: dict[str, Any]) -> str:
        return document_text(record, self.text_field, self.template)


def kind_of(paths: Iterable[str]) -> str:
    """Return "parquet", "json" (an object a line) or "text". Raises ValueError for files of several kinds."""
    found: dict[str, str] = {}
    for path in paths:
        found.setdefault(KINDS.get(_ending(path), "text"), path)
    if len(found) != 1:
        raise ValueError(f"text = {sorted(found.values())}: are {', '.join(sorted(found))}; give one kind")
    return next(iter(found))


def _ending(path: str | Path) -> str:
    """Return ".parquet" for a.parquet, ".json" for a.json.gz."""
    name = PurePosixPath(path)
    return PurePosixPath(name.stem).suffix if name.suffix in COMPRESSED else name.suffix


def find_files(names: list[str], columns: Sequence[str] = ()) -> list[str]:
    """Find the files that names, folders and patterns stand for, in order. Raises ValueError for a name that
    stands for none, and for a file that is empty or lacks one of the columns."""
    found: list[str] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and _ending(p) in KINDS)
            files = [str(p) for p in inside if not any(x[0] == "." for x in p.relative_to(path).parts)]
            if not files:
                raise ValueError(f"text = {name!r}: the folder holds no file of {', '.join(KINDS)}")
        else:
            files = [name] if path.is_file() else sorted(glob(name, recursive=True))
            if not files:
                raise ValueError(f"text = {name!r}: no such file")
        found += files
    for file in found:
        if next(records(file, columns=columns), None) is None:
            raise ValueError(f"text = {file!r}: the file is empty")
    return found


def shard_files(arguments: DataArguments) -> list[str]:
    """Find the files that a stream reads. Raises ValueError if they are no shards of records."""
    if arguments.text:
        files = find_files(arguments.text, arguments.fields)
    else:
        datasets = import_datasets(arguments)
        builder = datasets.load_dataset_builder(arguments.dataset, arguments.dataset_config)
        splits = builder.config.data_files or {}
        if arguments.dataset_split not in splits:
            raise ValueError(
                f"dataset_split = {arguments.dataset_split!r}: must be one of {sorted(map(str, splits))}"
            )
        files = list(splits[arguments.dataset_split])
    if kind_of(files) == "text":
        raise ValueError(
            f"streaming = True: reads shards of .parquet or .jsonl, and {arguments.source} is neither"
        )
    return files


def import_datasets(arguments: DataArguments):
    """Import the package datasets. Raises ValueError if it is missing."""
    try:
        import datasets
    except ImportError as error:
        raise _missing_package(arguments.source, "datasets") from error
    return datasets


def _missing_package(source: str, name: str) -> ValueError:
    return ValueError(f"{source}: reading it needs the package {name}; pip install 'qstar[data]'")


def records(path: str, first: int = 0, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the records of a file from its `first`-th on; of a Parquet file only these columns.

    path: a file, or an address that fsspec opens. Raises ValueError, naming the file, if it cannot be read or
    lacks one of the columns, or if a line is no JSON object.
    """
    kind = kind_of([path])
    with _opened("text", path, "rb" if kind == "parquet" else "rt") as file:
        if kind == "parquet":
            yield from _parquet_rows(path, file, first, columns)
        elif kind == "json":
            yield from _json_lines(path, file, first)
        elif not first and (text := file.read()).strip():
            yield {"text": text}


def read_text(option: str, path: str) -> str:
    """Read a whole text file. Raises ValueError, naming the option, if it is missing, empty or not UTF-8."""
    if not Path(path).is_file():
        raise ValueError(f"{option} = {path!r}: no such file")
    with _opened(option, path, "rt") as file:
        text = file.read()
    if not text.strip():
        raise ValueError(f"{option} = {path!r}: the file is empty")
    return text


@contextmanager
def _opened(option: str, path: str, mode: str) -> Iterator[IO]:
    """Open a file, compressed or not. Raises ValueError, naming it, for whatever fails while it is read."""
    import fsspec
    from fsspec.compression import compr

    if path.endswith(".zst") and "zstd" not in compr:
        raise _missing_package(f"{option} = {path!r}", "zstandard")
    try:
        encoding = {} if mode == "rb" else {"encoding": "utf-8"}
        with fsspec.open(path, mode, compression="infer", **encoding) as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} = {path!r}: is no UTF-8 text: {error}") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{option} = {path!r}: cannot be read: {error}") from error


def _parquet_rows(path: str, file: IO, first: int, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise _missing_package(f"text = {path!r}", "pyarrow") from error
    try:
        table = parquet.ParquetFile(file)
        missing = sorted(set(columns or ()) - set(table.schema_arrow.names))
        if missing:
            raise ValueError(f"text = {path!r}: has no column {missing}; it has {table.schema_arrow.names}")
        wanted = None if columns is None else list(columns)
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if first >= rows:  # skip it unread
                first -= rows
                continue
            for batch in table.iter_batches(batch_size=256, row_groups=[group], columns=wanted):
                yield from batch.slice(min(first, len(batch))).to_pylist()
                first = max(first - len(batch), 0)
    except pyarrow.ArrowException as error:
        raise ValueError(f"text = {path!r}: cannot be read as Parquet: {error}") from error


def _json_lines(path: str, file: IO, first: int) -> Iterator[dict[str, Any]]:
    lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
    for number, line in islice(lines, first, None):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"text = {path!r}: line {number} is no JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"text = {path!r}: line {number} is no JSON object: {line[:40]!r}")
        yield record


def document_text(record: dict[str, Any], text_field: str, template: str | None) -> str:
    """Return the text of a record: one of its fields, or a template filled with several. Raises ValueError if
    a field is missing or the text is empty."""
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
    """Return the fields that a template names. Raises ValueError for a template that names none."""
    try:
        names = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"template = {template!r}: {error}") from error
    if not names or any(not name or name.isdigit() for name in names):
        raise ValueError(f"template = {template!r}: must name fields of a record in braces, as {{question}}")
    return names
