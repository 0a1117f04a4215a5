"""`qstar bench data`: the loader of a stream over a made-up data set: speed, packing, memory, going on.

Shards are written to a temporary folder and read through `RowStream` and a DataLoader as the Trainer does,
once for each number of workers. Before any figure is shown, the rows of all of them must be the same, and a
stream that goes on in the middle must give the batch that came there.
"""

import gzip
import hashlib
import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from qstar.cli.options import parse_options
from qstar.data import DataArguments, RowStream, collate
from qstar.demo import TINY_LM
from qstar.option_checks import check_folder
from qstar.reporting import tables
from qstar.reporting.benchmark_record import TableArguments, WrongResultError, finish, machine
from qstar_bench.report import run_plots

TALK_LENGTH = 4
POINTS = 10  # of a pass at which memory is looked at
SENTENCES, WORDS = 20_000, 20_000


@dataclass(frozen=True)
class DataPreset:
    """MiB of text, in so many shards: a multiple of POINTS; characters of a window of the stream."""

    megabytes: float
    shards: int
    window: int = 2**20


PRESETS = {"1gb": DataPreset(1024, 40), "small": DataPreset(64, 20), "smoke": DataPreset(0.6, 10, 2**11)}


@dataclass
class DataBenchArguments:
    """What `qstar bench data` takes."""

    preset: str = field(default="1gb", metadata={"help": f"One of {', '.join(PRESETS)}."})
    workers: list[int] = field(
        default_factory=lambda: [2],
        metadata={"help": "Numbers of workers, one run for each; 0: none beside."},
    )
    kind: str = field(default="parquet", metadata={"help": "Of the shards: parquet, jsonl or json.gz."})
    span_length: int = field(default=256, metadata={"help": "Tokens in a row."})
    spans: str = field(default="all", metadata={"help": "all or random, see qstar train."})
    batch_size: int = field(default=8, metadata={"help": "Rows of a batch."})
    tokenizer: str = field(
        default=str(TINY_LM), metadata={"help": "Folder of a tokenizer; default: the embedded one."}
    )
    folder: str | None = field(
        default=None, metadata={"help": "Where the shards are put for a while; default: the system's."}
    )
    plot: str | None = field(default=None, metadata={"help": "Draw memory and speed as this PNG."})

    def __post_init__(self) -> None:
        for name, allowed in (("preset", tuple(PRESETS)), ("kind", ("parquet", "jsonl", "json.gz"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = {getattr(self, name)}: must be one of {', '.join(allowed)}")
        if self.kind == "parquet" and importlib.util.find_spec("pyarrow") is None:
            raise ValueError("kind = parquet: needs the package pyarrow; pip install 'qstar[data]'")
        if not self.workers or min(self.workers) < 0:
            raise ValueError(f"workers = {self.workers}: must be numbers of at least 0")
        if self.batch_size < 1:
            raise ValueError(f"batch_size = {self.batch_size}: must be at least 1")
        check_folder("plot", self.plot)


def write_stream(folder: Path, preset: DataPreset, kind: str, tokenizer, progress: bool) -> int:
    """Write the shards and return the number of documents. Their lengths are log-normal, half of them under
    2,000 characters; a document is sentences from a pool, of the tokenizer's own words, the first the
    commonest."""
    draw = np.random.default_rng(0)
    words = [tokenizer.decode([i]).strip() for i in range(min(len(tokenizer), WORDS))]
    words = [word for word in words if len(word) > 1 and word.isalpha()]
    often = 1 / np.arange(1, len(words) + 1)
    picked = draw.choice(len(words), (SENTENCES, 16), p=often / often.sum())
    pool = [" ".join(words[i] for i in row[: 4 + n % 13]) + ". " for n, row in enumerate(picked)]
    characters = sum(map(len, pool)) / SENTENCES
    documents = 0
    for number in tqdm(range(preset.shards), desc="write shards", disable=not progress):
        texts, size = [], 0.0
        while size < preset.megabytes * 2**20 / preset.shards:
            sentences = max(1, int(draw.lognormal(np.log(2000), 1.0) / characters))
            texts.append("".join(pool[i] for i in draw.integers(0, SENTENCES, sentences)))
            size += len(texts[-1])
        _write(folder / f"part-{number:04}.{kind}", texts)
        documents += len(texts)
    return documents


def _write(path: Path, texts: list[str]) -> None:
    rows = [{"text": text, "url": f"https://example.org/{i}"} for i, text in enumerate(texts)]
    if path.suffix == ".parquet":
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(rows), path, row_group_size=1000)
    else:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def held_bytes() -> int:
    """Give the memory in bytes of this process and its workers, shared pages counted once (the proportional
    set size)."""
    process = psutil.Process()
    return sum(each.memory_full_info().pss for each in (process, *process.children(recursive=True)))


@dataclass
class Pass:
    """Hold what one pass over the data gave. memory: (share of the shards that is read, bytes held); marks:
    (the share, the position of a batch, its bytes), and the time that looking at memory took is left out."""

    seconds: float = 0.0
    first_batch: float = 0.0
    rows: int = 0
    tokens: int = 0
    digest: str = ""
    memory: list[tuple[float, int]] = field(default_factory=list)
    marks: list[tuple[float, dict, bytes]] = field(default_factory=list)


def batches(stream: RowStream, args: DataBenchArguments) -> DataLoader:
    return DataLoader(stream, args.batch_size, collate_fn=partial(collate, length=args.span_length))


def one_pass(stream: RowStream, args: DataBenchArguments, progress: bool) -> Pass:
    found, sums = Pass(), hashlib.sha256()
    shards = len(stream.shards)
    bar = tqdm(total=shards, desc=f"{stream.workers} workers, shards", disable=not progress)
    begun = time.perf_counter()
    for batch in batches(stream, args):
        found.first_batch = found.first_batch or time.perf_counter() - begun
        content = batch["input_ids"].numpy().tobytes()
        state = stream.state_dict(found.rows)  # where this batch begins
        epoch, shard, _ = state["position"]
        read = shards if epoch else shard
        bar.update(read - bar.n)
        if read * POINTS >= shards * (len(found.memory) + 1):
            paused = time.perf_counter()
            found.memory.append((read / shards, held_bytes()))
            found.marks.append((read / shards, state, content))
            begun += time.perf_counter() - paused
        if epoch:
            break
        sums.update(content)
        found.rows += len(batch["input_ids"])
        found.tokens += int(batch["attention_mask"].sum())
    found.seconds = time.perf_counter() - begun
    found.digest = sums.hexdigest()
    bar.close()
    return found


def going_on(make: Callable[[], RowStream], args: DataBenchArguments, found: Pass) -> float:
    """Measure the seconds from loading the position at 90 % of the data to the first batch there. Raises
    WrongResultError where that batch, or the one of another mark, is not the one of the whole pass."""
    for share, state, content in (found.marks[0], found.marks[POINTS // 2], found.marks[-2]):
        stream = make()
        begun = time.perf_counter()
        stream.load_state_dict(state)
        batch = next(iter(batches(stream, args)))
        seconds = time.perf_counter() - begun
        if batch["input_ids"].numpy().tobytes() != content:
            raise WrongResultError(f"a stream that goes on after {share:.0%} of the data gives another batch")
    return seconds


def row(
    workers: int, found: Pass, resumed: float, documents: int, preset: DataPreset, span: int
) -> dict[str, Any]:
    held = [memory / 2**20 for _, memory in found.memory]
    return {
        "workers": workers,
        "seconds": found.seconds,
        "tokens/s": found.tokens / found.seconds,
        "documents/s": documents / found.seconds,
        "MiB/s": preset.megabytes / found.seconds,
        "first batch s": found.first_batch,
        "going on at 90 % s": resumed,
        "empty share of rows": 1 - found.tokens / (found.rows * span),
        "memory MiB at 10 %": held[0],
        "at 100 %": held[-1],
        "highest": max(held),
    }


def main(argv: list[str]) -> int:
    args, output = parse_options((DataBenchArguments, TableArguments), argv, prog="qstar bench data")
    preset = PRESETS[args.preset]
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    rows: list[dict[str, Any]] = []
    memory: list[dict[str, Any]] = []
    digests: set[str] = set()
    with TemporaryDirectory(dir=args.folder) as name:
        source = DataArguments(
            text=[name], span_length=args.span_length, spans=args.spans, streaming=True, held_out_rows=1
        )
        source.check(TALK_LENGTH)
        documents = write_stream(Path(name), preset, args.kind, tokenizer, not output.json)
        for workers in args.workers:
            make = partial(RowStream, source, tokenizer, TALK_LENGTH, 0, workers, preset.window)
            found = one_pass(make(), args, not output.json)
            digests.add(found.digest)
            if len(digests) > 1:
                raise WrongResultError(f"{workers} workers give other rows than {args.workers[0]}")
            rows.append(row(workers, found, going_on(make, args, found), documents, preset, args.span_length))
            memory += [
                {"workers": workers, "read MiB": share * preset.megabytes, "memory MiB": held / 2**20}
                for share, held in found.memory
            ]
    where = machine("cpu")
    if not output.json:
        print(tables.table(rows, digits=3))
        print(tables.table(memory, digits=1))
        print(f"{documents} documents, {found.tokens} tokens, {found.rows} rows a pass")
        print(", ".join(f"{name} {value}" for name, value in where.items()))
    growth = max(each["at 100 %"] / each["memory MiB at 10 %"] for each in rows)
    sizes = {"documents": documents, "tokens": found.tokens, "rows_a_pass": found.rows}
    document = finish("data", args, where, rows, output, memory_growth=growth, sizes=sizes, memory=memory)
    if args.plot is not None:
        run_plots.save(run_plots.of_run(document), args.plot)
    return 0
