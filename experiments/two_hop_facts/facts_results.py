"""What the proof has measured, test fact by test fact, as lines of a file that a later run goes on with; and
what it says in sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qstar.evaluation.statistics import Estimate, Sums, estimates
from qstar.reporting import jsonl

OVER_CONTROL, OVER_SHUFFLED = 0.15, 0.10  # what the mean over splits and seeds must reach
Row = dict[str, Any]


def thoughts(k: int, test: str = "") -> str:
    """Name of the condition that thinks k tokens, and of another test of the same model."""
    return f"thoughts, k = {k}" + (f", {test}" if test else "")


class Results(jsonl.Kept):
    """Lines of {seed, split, condition, seconds, facts, correct, nll, said}: of every test fact (its number
    in `facts()`), whether the likeliest letter was right, the NLL of the right one, and the thought."""

    def __init__(self, settings: dict[str, Any], output: Path):
        super().__init__(
            settings, output, "those of a proof", ("seed", "split", "condition"), ("facts", "correct")
        )


def accuracy(rows: list[Row]) -> dict[str, dict[tuple[int, int], float]]:
    """By condition and (seed, split): the share of the test facts whose letter was right."""
    found: dict[str, dict[tuple[int, int], float]] = {}
    for row in rows:
        share = float(np.mean(row["correct"]))
        found.setdefault(row["condition"], {})[row["seed"], row["split"]] = share
    return found


def summary(rows: list[Row], lengths: list[int]) -> tuple[list[Row], list[Row]]:
    """(a row of each condition, a row of each difference that the claim is about): means over all splits and
    seeds with 95 % intervals, and the least and largest of a split. Drawn again are facts: one that is in the
    test of several splits and seeds stays together. Conditions that some split or seed lacks are left out."""
    shares = accuracy(rows)
    runs = max(len(x) for x in shares.values())
    tests = ("w = 1", "w = 0", "shuffled", "")
    order = ["before", "control", "pause", *(thoughts(k, test) for k in lengths for test in tests)]
    # whatever order they were measured in; a length that is not asked for comes last
    names = [name for name in dict.fromkeys([*order, *shares]) if len(shares.get(name, {})) == runs]
    of = {name: _sums([row for row in rows if row["condition"] == name]) for name in names}
    pairs = [
        (thoughts(k), other)
        for k in lengths
        for other in ("control", thoughts(k, "shuffled"), "pause", thoughts(k, "w = 0"))
        if {thoughts(k), other} <= of.keys()
    ]
    alone, differences = estimates(of, pairs)
    nll = {name: np.mean([row["nll"] for row in rows if row["condition"] == name]) for name in names}
    conditions = [
        {"condition": name, **_row(alone[name], list(shares[name].values())), "nll": float(nll[name])}
        for name in names
    ]
    claims = [
        {
            "difference": f"{a} - {b}",
            **_row(differences[a, b], [shares[a][run] - shares[b][run] for run in shares[a]]),
        }
        for a, b in pairs
    ]
    return conditions, claims


def _sums(rows: list[Row]) -> Sums:
    correct = np.concatenate([np.asarray(row["correct"], dtype=np.float64) for row in rows])
    fact = np.concatenate([np.asarray(row["facts"]) for row in rows])
    _, cluster = np.unique(fact, return_inverse=True)
    return Sums.by_cluster(correct, cluster)


def _row(x: Estimate, runs: list[float]) -> Row:
    return {
        "mean": x.mean,
        "low": x.low,
        "high": x.high,
        "least split": min(runs),
        "largest split": max(runs),
        "n": x.n,
    }


def holds(claims: list[Row], k: int) -> bool:
    """Thoughts of k tokens beat the control and the shuffled thoughts by what they must, in the mean over
    splits and seeds, and are below neither in any."""
    needed = {"control": OVER_CONTROL, thoughts(k, "shuffled"): OVER_SHUFFLED}
    found = {row["difference"]: row for row in claims}
    rows = [(found[f"{thoughts(k)} - {other}"], least) for other, least in needed.items()]
    return all(row["mean"] >= least and row["least split"] >= 0 for row, least in rows)


def figure(conditions: list[Row], shares: dict[str, dict[tuple[int, int], float]], path: Path) -> None:
    """Bars of the means with their intervals, a dot for every split and seed, as one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(figsize=(9, 0.45 * len(conditions) + 1.2), layout="constrained")
    for at, row in enumerate(conditions):
        thinks = row["condition"].startswith("thoughts") and row["condition"].count(",") == 1
        axes.barh(at, row["mean"], color="tab:blue" if thinks else "lightgray")
        axes.plot([row["low"], row["high"]], [at, at], color="black", linewidth=1)
        runs = list(shares[row["condition"]].values())
        axes.plot(runs, [at] * len(runs), "o", color="tab:orange", markersize=4, alpha=0.7)
    axes.set_yticks(range(len(conditions)), [row["condition"] for row in conditions])
    axes.invert_yaxis()
    axes.set_xlabel("share of unseen facts whose first letter is right; dots: splits and seeds")
    axes.grid(axis="x", alpha=0.3)
    drawing.savefig(path, dpi=120)
    pyplot.close(drawing)
