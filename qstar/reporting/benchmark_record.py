"""What every measurement shares, of the benches and of `qstar eval`: where its figures go, and which machine
they hold for.

A run is one JSON document {"bench", "when", "machine", "arguments", "rows", and figures of its own}: the last
line of stdout, and with `--append` a line of a JSONL file, which `qstar bench report` and all plots are made
from. rows are those of the printed table, flat.
"""

import csv
import json
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
import triton

from qstar.option_checks import check_folder
from qstar.reporting import tables


class WrongResultError(ValueError):
    """Say that what is measured computes a wrong result: no figure is shown. A ValueError, because the
    command line reports those in one line."""


@dataclass
class TableArguments:
    """Where the figures of a bench go, beside the table."""

    json: bool = field(default=False, metadata={"help": "Print only the JSON document."})
    append: str | None = field(
        default=None,
        metadata={"help": "Add the run to this JSONL file, or its table to this CSV file (by its ending)."},
    )

    def __post_init__(self) -> None:
        if self.append is not None and Path(self.append).suffix not in (".jsonl", ".csv"):
            raise ValueError(f"append = {self.append}: must end with .jsonl or .csv")
        check_folder("append", self.append)


@dataclass
class OutputArguments(TableArguments):
    """Where the figures of a bench go, and a trace of what it measures."""

    trace: str | None = field(
        default=None,
        metadata={"help": "Write a chrome trace of one call of what is measured, apart from the timing."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_folder("trace", self.trace)


def check_device(device: str) -> None:
    """Check a device. Raises ValueError unless it is "cpu", or "cuda" on a machine with a GPU."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device = {device}: must be cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = cuda: torch sees no GPU on this machine")


def machine(device: str, **more: Any) -> dict[str, Any]:
    """Give what every figure depends on: device ("cpu" or "cuda"), threads, versions, commit, and `more`."""
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device != "cpu" else f"cpu ({_processor()})",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
    }
    if device != "cpu":
        properties = torch.cuda.get_device_properties(0)
        found["cuda"] = torch.version.cuda or torch.version.hip
        found["memory GiB"] = properties.total_memory / 2**30
        found["processors"] = properties.multi_processor_count
    return found | more


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Give the commit of the running sources, with a + if files are changed; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def finish(
    bench: str,
    arguments: Any,
    where: dict[str, Any],
    rows: list[dict[str, Any]],
    output: TableArguments,
    **figures: Any,
) -> dict[str, Any]:
    """End a bench: append the run to the file of `--append` and print it as the last line of stdout."""
    document = {
        "bench": bench,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": where,
        "arguments": asdict(arguments),
        **figures,
        "rows": rows,
    }
    if output.append is not None:
        path = Path(output.append)
        if path.suffix == ".jsonl":
            with path.open("a", encoding="utf-8") as file:
                print(json.dumps(document, ensure_ascii=False), file=file)
        else:
            _append_table(path, [{"bench": bench, "when": document["when"]} | row for row in rows])
    tables.last_line(document)
    return document


def _append_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows to a CSV file. Raises ValueError when its columns differ: figures would shift."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    begun = path.exists() and path.stat().st_size > 0
    if begun:
        with path.open(newline="", encoding="utf-8") as file:
            there = next(csv.reader(file))
        if there != names:
            raise ValueError(f"append = {path}: its columns are {there}, the run's are {names}")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        if not begun:
            writer.writeheader()
        writer.writerows(rows)
