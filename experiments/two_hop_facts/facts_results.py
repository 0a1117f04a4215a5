"""Sum up what the study has measured: means with intervals, the verdict and the figure."""

from pathlib import Path

import numpy as np

from experiments.shared.comparison import Row, compare
from experiments.shared.figures import bars, drawing
from qstar.evaluation.statistics import Sums

OVER_CONTROL, OVER_SHUFFLED = 0.15, 0.10  # what the mean over splits and seeds must reach


def thoughts(k: int, test: str = "") -> str:
    """Name the condition that thinks k tokens, or another test of the same model."""
    return f"thoughts, k = {k}" + (f", {test}" if test else "")


def accuracy(rows: list[Row]) -> dict[str, dict[tuple[int, int], float]]:
    """Return the share of the test facts whose letter was right, by condition and (seed, split)."""
    found: dict[str, dict[tuple[int, int], float]] = {}
    for row in rows:
        share = float(np.mean(row["correct"]))
        found.setdefault(row["condition"], {})[row["seed"], row["split"]] = share
    return found


def summary(rows: list[Row], lengths: list[int]) -> tuple[list[Row], list[Row]]:
    """Return (a row of each condition that every split and seed has, a row of each difference that the claim
    is about). The bootstrap draws facts: one that several splits and seeds test stays together."""
    shares = accuracy(rows)
    runs = max(len(x) for x in shares.values())
    tests = ("w = 1", "w = 0", "shuffled", "")
    order = ["before", "control", "pause", *(thoughts(k, test) for k in lengths for test in tests)]
    # in this order whatever was measured first; a length that is not asked for comes last
    names = [name for name in dict.fromkeys([*order, *shares]) if len(shares.get(name, {})) == runs]
    of = {name: [row for row in rows if row["condition"] == name] for name in names}
    pairs = [
        (thoughts(k), other)
        for k in lengths
        for other in ("control", thoughts(k, "shuffled"), "pause", thoughts(k, "w = 0"))
    ]
    conditions, claims = compare({name: _sums(x) for name, x in of.items()}, shares, pairs, "split")
    for row in conditions:
        row["nll"] = float(np.mean([x["nll"] for x in of[row["condition"]]]))
    return conditions, claims


def _sums(rows: list[Row]) -> Sums:
    correct = np.concatenate([np.asarray(row["correct"], dtype=np.float64) for row in rows])
    fact = np.concatenate([np.asarray(row["facts"]) for row in rows])
    _, cluster = np.unique(fact, return_inverse=True)
    return Sums.by_cluster(correct, cluster)


def holds(claims: list[Row], k: int) -> bool:
    """Tell whether thoughts of k tokens beat the control and the shuffled thoughts by what they must, in the
    mean over splits and seeds, and are below neither in any split."""
    needed = {"control": OVER_CONTROL, thoughts(k, "shuffled"): OVER_SHUFFLED}
    found = {row["difference"]: row for row in claims}
    rows = [(found[f"{thoughts(k)} - {other}"], least) for other, least in needed.items()]
    return all(row["mean"] >= least and row["least split"] >= 0 for row, least in rows)


def figure(conditions: list[Row], shares: dict[str, dict[tuple[int, int], float]], path: Path) -> None:
    """Draw the accuracy of every condition, as a PNG."""
    thinks = {name for name in shares if name.startswith("thoughts") and name.count(",") == 1}
    with drawing(path, 1, 1, (9, 0.45 * len(conditions) + 1.2)) as (_, axes):
        bars(axes[0, 0], conditions, shares, thinks)
        axes[0, 0].set_xlabel("share of unseen facts whose first letter is right; dots: splits and seeds")
