"""`qstar bench report RUN.jsonl ... -o report.html`: the runs of some files as one page, and their plots."""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qstar.cli.options import Parser
from qstar.option_checks import check_folder
from qstar_bench.report import run_plots
from qstar_bench.report.report_page import is_run, page


def options(argv: list[str]) -> argparse.Namespace:
    """Parse runs, output and plots. Raises ValueError for what is unknown or missing."""
    parser = Parser(
        prog="qstar bench report",
        description="One self-contained HTML page of runs that a bench wrote with --append.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN.jsonl", help="Files of runs, one a line.")
    parser.add_argument("-o", "--output", default="report.html", help="The page (default: %(default)s).")
    parser.add_argument("--plots", metavar="FOLDER", help="Also write each run's plots as a PNG in there.")
    return parser.parse_args(argv)


def load(path: str) -> list[dict[str, Any]]:
    """Load the runs of a file: one a line, or one document over all lines, as `make gpu` writes it.

    Raises ValueError for a file that is missing or empty, and for a line that is no run, naming it.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is no text in UTF-8") from error
    if not text.strip():
        raise ValueError(f"{path}: is empty")
    try:
        documents = [(path, json.loads(text))]
    except json.JSONDecodeError:
        documents = list(_lines(path, text))
    for place, document in documents:
        if not is_run(document):
            raise ValueError(
                f"{place}: is no run of a bench: it must have bench, when, machine, arguments and rows"
            )
    return [run for _, document in documents for run in (document, *_runs_inside(document))]


def _lines(path: str, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                yield place, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: is no JSON: {error.msg} at column {error.colno}") from error


def _runs_inside(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that a run started and holds in its figures, as `qstar bench gpu` does."""
    lists = [figure for figure in run.values() if isinstance(figure, list)]
    rows = [row for figure in lists for row in figure if isinstance(row, dict)]
    return [value for row in rows for value in row.values() if is_run(value)]


def main(argv: list[str]) -> int:
    args = options(argv)
    for name in ("output", "plots"):
        check_folder(name, getattr(args, name))
    runs = [run for path in args.runs for run in load(path)]
    Path(args.output).write_text(page(runs), encoding="utf-8")
    print(args.output)
    if args.plots is not None:
        Path(args.plots).mkdir(exist_ok=True)
        for i, run in enumerate(runs, 1):
            if drawn := run_plots.of_run(run):
                name = re.sub(r"\W+", "-", run["bench"])
                path = Path(args.plots) / f"{i}-{name}.png"
                run_plots.save(drawn, path)
                print(path)
    return 0
