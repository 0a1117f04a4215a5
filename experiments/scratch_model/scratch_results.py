"""What the proof has measured, question by question, as lines of a file that a later run goes on with; and
what it says in sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qstar.evaluation.statistics import Sums, estimates
from qstar.reporting import jsonl

OVER = 0.30  # accuracy that thoughts must add to the control, and to shuffled thoughts,
KINDS_OVER = 3  # on so many kinds
PROSE_WORSE = 0.02  # nats a token that prose may be worse than the control
CONDITIONS = ("base", "control", "w = 0", "shuffled", "thoughts")
PAIRS = tuple(("thoughts", other) for other in ("control", "shuffled", "w = 0"))
MEASURES = {"accuracy": ("correct", "asked"), "nll": ("nll", "tokens"), "hard": ("hard_nll", "hard")}
Row = dict[str, Any]


class Results(jsonl.Kept):
    """Lines of {seed, condition, kind, seconds, useful, told, and the sums of `experiment.measure`}."""

    def __init__(self, settings: dict[str, Any], output: Path):
        sums = {name for pair in MEASURES.values() for name in pair}
        super().__init__(settings, output, "those of a proof", ("seed", "condition", "kind"), sums)


def measured(rows: list[Row], kind: str, measure: str) -> dict[str, Sums]:
    """By condition that every seed of the rows has: sums over seeds of each question (of prose, each span of
    text), in one cluster, since it is the same for every seed."""
    top, bottom = MEASURES[measure]
    seeds = {row["seed"] for row in rows}
    found = {}
    for name in CONDITIONS:
        of = [row for row in rows if (row["kind"], row["condition"]) == (kind, name)]
        if {row["seed"] for row in of} == seeds:
            sums, counts = (np.array([row[x] for row in of], dtype=np.float64) for x in (top, bottom))
            found[name] = Sums(sums.sum(0), counts.sum(0))
    return found


def by_seed(rows: list[Row], kind: str, measure: str, condition: str) -> dict[int, float]:
    """The mean of a condition, by seed."""
    top, bottom = MEASURES[measure]
    return {
        row["seed"]: sum(row[top]) / sum(row[bottom])
        for row in rows
        if (row["kind"], row["condition"]) == (kind, condition)
    }


def summary(rows: list[Row], kinds: list[str]) -> tuple[list[Row], list[Row]]:
    """(a row of each kind, measure and condition; a row of each difference): means over seeds, with 95 %
    intervals over questions, and the least and largest seed."""
    conditions, differences = [], []
    for kind in kinds:
        for measure in MEASURES:
            of = measured(rows, kind, measure)
            seeds = {name: by_seed(rows, kind, measure, name) for name in of}
            alone, paired = estimates(of, [pair for pair in PAIRS if {*pair} <= of.keys()])
            for name, x in alone.items():
                row = {"kind": kind, "measure": measure, "condition": name}
                conditions.append(row | _figures(x, list(seeds[name].values())))
            for (a, b), x in paired.items():
                row = {"kind": kind, "measure": measure, "difference": f"{a} - {b}"}
                differences.append(row | _figures(x, [seeds[a][s] - seeds[b][s] for s in seeds[a]]))
    return conditions, differences


def _figures(x: Any, seeds: list[float]) -> Row:
    figures = {"mean": x.mean, "low": x.low, "high": x.high}
    return figures | {"least seed": min(seeds), "largest seed": max(seeds), "n": x.n}


def verdict(differences: list[Row], kinds: list[str]) -> dict[str, Any]:
    """over: the built kinds on which thoughts are far enough above the control and above shuffled thoughts;
    prose: whether the interval of thoughts - control, in nats, ends below what is allowed."""
    found = {(x["kind"], x["measure"], x["difference"]): x for x in differences}
    over = []
    for kind in kinds:
        rows = [found[kind, "accuracy", f"thoughts - {other}"] for other in ("control", "shuffled")]
        if all(row["mean"] >= OVER and row["low"] > 0 for row in rows):
            over.append(kind)
    prose = found["prose", "nll", "thoughts - control"]["high"] <= PROSE_WORSE
    return {"over": over, "kinds": len(over) >= KINDS_OVER, "prose": bool(prose)}


def diagnostics(rows: list[Row], kinds: list[str]) -> list[Row]:
    """A row of each kind, means over seeds: useful, the share of thoughts sampled after the questions that
    are the useful aside; told, the accuracy after it is written out, and the least of a seed."""
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
    """A row of each kind: mean and interval by condition, as text."""
    table: dict[str, Row] = {}
    for row in conditions:
        if row["measure"] == measure:
            line = table.setdefault(row["kind"], {"kind": row["kind"], "n": row["n"]})
            line[row["condition"]] = f"{row['mean']:.3f} ({row['low']:.3f} - {row['high']:.3f})"
    return list(table.values())


def figure(rows: list[Row], conditions: list[Row], kinds: list[str], path: Path) -> None:
    """A PNG: of each kind the accuracy and the NLL of hard tokens by condition, bars with their intervals and
    a dot for every seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = {"accuracy": "accuracy", "hard": "NLL of the hardest tenth, nats"}
    drawing, panels = pyplot.subplots(
        len(labels), len(kinds), figsize=(2.6 * len(kinds), 6), layout="constrained", squeeze=False
    )
    for line, measure in zip(panels, labels):
        for axis, kind in zip(line, kinds):
            bars = [row for row in conditions if (row["kind"], row["measure"]) == (kind, measure)]
            for at, row in enumerate(bars):
                axis.bar(at, row["mean"], color="tab:blue" if row["condition"] == "thoughts" else "lightgray")
                axis.plot([at, at], [row["low"], row["high"]], color="black", linewidth=1)
                runs = list(by_seed(rows, kind, measure, row["condition"]).values())
                axis.plot([at] * len(runs), runs, "o", color="tab:orange", markersize=4, alpha=0.7)
            axis.set_xticks(range(len(bars)), [row["condition"] for row in bars], rotation=45, ha="right")
            axis.set_title(kind)
            axis.grid(axis="y", alpha=0.3)
            if measure == "accuracy" and kind != "prose":
                axis.set_ylim(0, 1.05)
        line[0].set_ylabel(labels[measure])
    drawing.savefig(path, dpi=100)
    pyplot.close(drawing)
