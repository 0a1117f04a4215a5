"""The figures of an evaluation as flat rows, for machines, and as the tables that a person reads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from qstar.evaluation.run import Figures
from qstar.evaluation.statistics import Estimate, Sums, estimates
from qstar.evaluation.text import Measured
from qstar.reporting import tables

Row = dict[str, Any]


def question_rows(
    figures: dict[str, list[Figures]], metrics: Sequence[str], seed: int = 0
) -> tuple[list[Row], list[Row]]:
    """(a row of each condition, a row of each pair of them): the metrics' means over the questions."""
    pairs = [(b, a) for a, b in combinations(figures, 2)]
    found = {
        metric: estimates(
            {name: Sums.of([x[metric] for x in of]) for name, of in figures.items()}, pairs, seed
        )
        for metric in metrics
    }
    return _rows(list(figures), pairs, found)


def text_rows(measured: Measured, last: str, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """As `question_rows`, with NLL in nats a token over all tokens and over the hard ones. The reference at
    other temperatures is paired with the condition `last` alone."""
    conditions = list(measured.all)
    pairs = [(b, a) for a, b in combinations(conditions, 2) if {a, b} <= set(measured.weight) or b == last]
    found = {name: estimates(getattr(measured, name), pairs, seed) for name in ("all", "hard")}
    rows, differences = _rows(conditions, pairs, found)
    for row in rows:
        row["weight"] = measured.weight.get(row["condition"])
    return rows, differences


def _rows(conditions: list[str], pairs: list[tuple[str, str]], found: dict) -> tuple[list[Row], list[Row]]:
    alone: list[Row] = [{"condition": name} for name in conditions]
    differences: list[Row] = [{"difference": f"{b} - {a}", "of": [b, a]} for b, a in pairs]
    for metric, (means, paired) in found.items():
        for rows, keys, of in ((alone, conditions, means), (differences, pairs, paired)):
            for row, key in zip(rows, keys):
                _add(row, metric, of[key])
    return alone, differences


def _add(row: Row, metric: str, x: Estimate) -> None:
    """n: of the first metric, and of those that have as many values."""
    if row.setdefault("n", x.n) != x.n:
        row[f"{metric}_n"] = x.n
    row |= {metric: x.mean, f"{metric}_low": x.low, f"{metric}_high": x.high}


def shown(rows: list[Row], headers: dict[str, str], digits: int) -> str:
    """Rows as a Markdown table; headers: name of a column by metric, each cell a mean and its interval."""
    table = []
    for row in rows:
        kind = "condition" if "condition" in row else "difference"
        sign = "" if kind == "condition" else "+"
        line: Row = {kind: row[kind], "N": row["n"]}
        for metric, header in headers.items():
            if f"{metric}_n" in row:
                line[f"N, {metric}"] = row[f"{metric}_n"]
            if f"{metric}_low" in row:
                mean, low, high = (
                    f"{row[name]:{sign}.{digits}f}" for name in (metric, f"{metric}_low", f"{metric}_high")
                )
                line[header] = f"{mean} [{low}, {high}]"
            else:
                line[header] = row[metric]
        table.append(line)
    return tables.table(table, digits)
