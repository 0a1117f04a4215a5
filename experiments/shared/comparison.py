"""Compare conditions that several runs measured: means with intervals, and the least and largest run."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from qstar.evaluation.statistics import Estimate, Sums, estimates

Row = dict[str, Any]
Runs = Mapping[str, Mapping[Any, float]]  # by condition and run


def compare(
    sums: dict[str, Sums], runs: Runs, pairs: Sequence[tuple[str, str]], run: str
) -> tuple[list[Row], list[Row]]:
    """Return a row of each condition, and one of the difference a - b of each pair that was measured.

    sums: by condition, over all runs, for means and 95 % intervals. runs: the mean of every run, each of
    which is called a `run` ("seed") in the rows.
    """

    def row(x: Estimate, values: Collection[float]) -> Row:
        interval = {"mean": x.mean, "low": x.low, "high": x.high}
        return interval | {f"least {run}": min(values), f"largest {run}": max(values), "n": x.n}

    alone, paired = estimates(sums, [pair for pair in pairs if {*pair} <= sums.keys()])
    conditions = [{"condition": name} | row(x, runs[name].values()) for name, x in alone.items()]
    differences = [
        {"difference": f"{a} - {b}"} | row(x, [runs[a][i] - runs[b][i] for i in runs[a]])
        for (a, b), x in paired.items()
    ]
    return conditions, differences
