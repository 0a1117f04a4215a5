"""What every measurement shares, of the benches and of `qstar eval`: where its figures go, and which machine
they hold for.

A run is one JSON document {"bench", "when", "machine", "arguments", "rows", and figures of its own}: the last
line of stdout, and with `--append` a line of a JSONL file, which `qstar bench report` and all plots are made
from. rows are those of the printed table, flat.
"""

from __future__ import annotations

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
    """What is measured does not compute what it should, so that no figure of the run is shown. A ValueError:
    the command line tells it in one line."""


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
    """Raises ValueError for a device that is none, or is not here."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device = {device}: must be cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = cuda: torch sees no GPU on this machine")


def machine(device: str, **more: Any) -> dict[str, Any]:
    """What every figure depends on; device is "cpu" or "cuda"."""
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
        found["cuda"] = torch.version.cuda or torch.version.hip
    return found | more


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the sources that run, with a + where files of it are changed; None outside a checkout."""
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
    """Ends a bench: appends the run where it was asked to, and prints it as the last line of stdout."""
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
    """Raises ValueError when the file's columns are others: its figures would shift."""
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
