"""Sum up what the study has measured: means with intervals, the verdict, tables and the figure."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.shared.comparison import Row, compare
from experiments.shared.figures import bars, drawing
from qstar.evaluation.statistics import Sums

OVER = 0.30  # accuracy that thoughts must add to the control and to shuffled thoughts
KINDS_OVER = 3  # kinds on which they must
PROSE_WORSE = 0.02  # nats a token by which prose may be worse than with the control
CONDITIONS = ("base", "control", "w = 0", "shuffled", "thoughts")
PAIRS = tuple(("thoughts", other) for other in ("control", "shuffled", "w = 0"))
MEASURES = {"accuracy": ("correct", "asked"), "nll": ("nll", "tokens"), "hard": ("hard_nll", "hard")}
COLUMNS = {name for pair in MEASURES.values() for name in pair}  # sums of `scratch_training.measure`


def measured(rows: list[Row], kind: str, measure: str) -> dict[str, Sums]:
    """Return the sums over all seeds of each condition that every seed has; a question (of prose, a span) is
    one cluster, since it is the same for every seed."""
    top, bottom = MEASURES[measure]
    seeds = {row["seed"] for row in rows}
    found = {}
    for name in CONDITIONS:
        of = [row for row in rows if (row["kind"], row["condition"]) == (kind, name)]
        if {row["seed"] for row in of} == seeds:
            sums, counts = (np.array([row[x] for row in of], dtype=np.float64) for x in (top, bottom))
            found[name] = Sums(sums.sum(0), counts.sum(0))
    return found


def by_seed(rows: list[Row], kind: str, measure: str) -> dict[str, dict[int, float]]:
    """Return the mean of every seed, by condition."""
    top, bottom = MEASURES[measure]
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["kind"] == kind:
            found.setdefault(row["condition"], {})[row["seed"]] = sum(row[top]) / sum(row[bottom])
    return found


def summary(rows: list[Row], kinds: list[str]) -> tuple[list[Row], list[Row]]:
    """Return (a row of each kind, measure and condition; a row of each difference)."""
    conditions, differences = [], []
    for kind in kinds:
        for measure in MEASURES:
            about = {"kind": kind, "measure": measure}
            found = compare(measured(rows, kind, measure), by_seed(rows, kind, measure), PAIRS, "seed")
            conditions += [about | row for row in found[0]]
            differences += [about | row for row in found[1]]
    return conditions, differences


def verdict(differences: list[Row], kinds: list[str]) -> dict[str, Any]:
    """Return what holds. over: the kinds on which thoughts are far enough above the control and the shuffled
    thoughts; kinds: whether these are enough; prose: whether the interval of thoughts - control, in nats,
    ends below what is allowed."""
    found = {(x["kind"], x["measure"], x["difference"]): x for x in differences}
    over = []
    for kind in kinds:
        rows = [found[kind, "accuracy", f"thoughts - {other}"] for other in ("control", "shuffled")]
        if all(row["mean"] >= OVER and row["low"] > 0 for row in rows):
            over.append(kind)
    prose = found["prose", "nll", "thoughts - control"]["high"] <= PROSE_WORSE
    return {"over": over, "kinds": len(over) >= KINDS_OVER, "prose": bool(prose)}


def diagnostics(rows: list[Row], kinds: list[str]) -> list[Row]:
    """Return a row of each kind, with means over seeds: the share of sampled thoughts that are the useful
    aside, and the accuracy after that aside is written out (told), with the least of a seed."""
    found = []
    for kind in kinds:
        line: Row = {"kind": kind}
        for condition, when in (("base", "before"), ("thoughts", "after")):
            of = [row for row in rows if (row["kind"], row["condition"]) == (kind, condition)]
            told = [row["told"] for row in of]
            line[f"useful {when}"] = float(np.mean([row["useful"] for row in of]))
            line |= {f"told {when}": float(np.mean(told)), f"least told {when}": min(told)}
        found.append(line)
    return found


def shown(conditions: list[Row], measure: str) -> list[Row]:
    """Return a row of each kind: mean and interval by condition, as text."""
    table: dict[str, Row] = {}
    for row in conditions:
        if row["measure"] == measure:
            line = table.setdefault(row["kind"], {"kind": row["kind"], "n": row["n"]})
            line[row["condition"]] = f"{row['mean']:.3f} ({row['low']:.3f} - {row['high']:.3f})"
    return list(table.values())


def figure(rows: list[Row], conditions: list[Row], kinds: list[str], path: Path) -> None:
    """Draw the accuracy and the NLL of hard tokens of each kind by condition, as a PNG."""
    labels = {"accuracy": "accuracy", "hard": "NLL of the hardest tenth, nats"}
    with drawing(path, len(labels), len(kinds), (2.8 * len(kinds), 4.5)) as (_, axes):
        for line, measure in zip(axes, labels):
            for axis, kind in zip(line, kinds):
                of = [row for row in conditions if (row["kind"], row["measure"]) == (kind, measure)]
                bars(axis, of, by_seed(rows, kind, measure), {"thoughts"})
                axis.set_title(kind)
                axis.set_xlabel(labels[measure])
                if measure == "accuracy" and kind != "prose":
                    axis.set_xlim(0, 1.05)
