"""Turn the figures of an evaluation into flat rows, which `reporting.tables.intervals` shows."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from qstar.evaluation.run import Figures
from qstar.evaluation.statistics import Sums, estimates
from qstar.evaluation.text import Measured

Row = dict[str, Any]
Pair = tuple[str, str]


def question_rows(
    figures: dict[str, list[Figures]], metrics: Sequence[str], seed: int = 0
) -> tuple[list[Row], list[Row]]:
    """Return a row for each condition and a row for each pair of them: the metrics' means over questions."""
    sums = {
        metric: {name: Sums.of([x[metric] for x in of]) for name, of in figures.items()} for metric in metrics
    }
    return _rows(sums, [(b, a) for a, b in combinations(figures, 2)], seed)


def text_rows(measured: Measured, last: str, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Return rows as `question_rows` does: the NLL in nats per token over all tokens and over hard ones. The
    reference at other temperatures is paired with the condition `last` alone."""
    pairs = [
        (b, a) for a, b in combinations(measured.all, 2) if {a, b} <= measured.weight.keys() or b == last
    ]
    rows, differences = _rows({"all": measured.all, "hard": measured.hard}, pairs, seed)
    for row in rows:
        row["weight"] = measured.weight.get(row["condition"])
    return rows, differences


def _rows(sums: dict[str, dict[str, Sums]], pairs: list[Pair], seed: int) -> tuple[list[Row], list[Row]]:
    """sums: of each condition, by metric. n is that of the first metric and of those with as many values."""
    conditions = {name: {"condition": name} for of in sums.values() for name in of}
    differences: dict[Pair, Row] = {(b, a): {"difference": f"{b} - {a}", "of": [b, a]} for b, a in pairs}
    for metric, of in sums.items():
        means, paired = estimates(of, pairs, seed)
        for rows, found in ((conditions, means), (differences, paired)):
            for key, x in found.items():
                row: Row = rows[key]  # type: ignore[index]
                if row.setdefault("n", x.n) != x.n:
                    row[f"{metric}_n"] = x.n
                row |= {metric: x.mean, f"{metric}_low": x.low, f"{metric}_high": x.high}
    return list(conditions.values()), list(differences.values())
