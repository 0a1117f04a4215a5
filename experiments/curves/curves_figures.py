"""Make the figures and the table of the learning curves from the rows of finished runs alone."""

from pathlib import Path

import numpy as np

from experiments.shared.comparison import Row
from experiments.shared.figures import drawing
from qstar.demo.town import CHANCE

LEARNED = 0.5  # direct accuracy
PANELS = {
    "direct_accuracy": "direct accuracy",
    "useful_share": "share of useful thoughts",
    "mixed_nll": "mixed NLL, nats a token",
    "mix_weight": "mean mixing weight w",
    "reward": "mean reward, nats",
}


def values(row: Row, name: str) -> list[float]:
    """Return a figure at every point of a run; NaN where it is missing, like the first reward."""
    return [point.get(name, np.nan) for point in row["points"]]


def draw(name: str, levels: dict[str, list[Row]], path: Path) -> None:
    """Draw each panel over the training steps, and what is reached at the end, as a PNG: a thin line or a
    mark for every seed, a thick line or a bar for their mean."""
    lengths = {values(rows[0], "step")[-1] for rows in levels.values()}
    with drawing(path, 2, 3, (13, 7)) as (figure, axes):
        for (key, label), axis in zip(PANELS.items(), axes.flat):
            for i, (level, rows) in enumerate(levels.items()):
                steps = values(rows[0], "step")
                curves = np.array([values(row, key) for row in rows])
                axis.plot(steps, curves.T, color=f"C{i}", linewidth=0.7, alpha=0.6)
                axis.plot(steps, curves.mean(0), color=f"C{i}", linewidth=2, label=level)
            axis.set_title(label)
            axis.set_xlabel("training step")
            if max(lengths) > min(lengths):
                axis.set_xscale("symlog", linthresh=min(lengths))
                axis.set_xticks(sorted({0, min(lengths) // 2, *lengths}))
                axis.xaxis.set_major_formatter("{x:g}")
        axes.flat[0].axhline(CHANCE, color="gray", linestyle=":")
        figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)

        axis = axes.flat[-1]
        for shift, marker, key in ((-0.15, "o", "direct_accuracy"), (0.15, "^", "useful_share")):
            for at, rows in enumerate(levels.values()):
                ends = [values(row, key)[-1] for row in rows]
                axis.plot([at + shift] * len(ends), ends, marker, color=f"C{at}", alpha=0.6)
                axis.hlines(np.mean(ends), at + shift - 0.12, at + shift + 0.12, color=f"C{at}")
        axis.set_xticks(range(len(levels)), levels, fontsize=8, rotation=20, ha="right")
        axis.set_ylim(-0.05, 1.05)
        axis.set_title("at the end: accuracy ●, useful thoughts ▲")
        seeds = sorted({len(rows) for rows in levels.values()})
        figure.suptitle(
            f"{name}: a thin line for each of {' or '.join(map(str, seeds))} seeds, thick their mean"
        )


def first_over(row: Row, accuracy: float) -> int | None:
    """Return the first step at which the direct accuracy was measured to be over `accuracy`."""
    return next((p["step"] for p in row["points"] if p["direct_accuracy"] > accuracy), None)


def summary(name: str, levels: dict[str, list[Row]]) -> list[Row]:
    """Return a row for each level: how many seeds have learned, and what all have reached at the end."""
    found = []
    for level, rows in levels.items():
        ends = {key: [values(row, key)[-1] for row in rows] for key in ("useful_share", "mixed_nll")}
        accuracy = [values(row, "direct_accuracy")[-1] for row in rows]
        firsts = [step for row in rows if (step := first_over(row, LEARNED)) is not None]
        found.append(
            {
                "figure": name,
                "level": level,
                "seeds": len(rows),
                "steps": rows[0]["points"][-1]["step"],
                "learned": sum(x > LEARNED for x in accuracy),
                "earliest step": min(firsts, default=None),
                "latest step": max(firsts, default=None),
                "accuracy": float(np.mean(accuracy)),
                "least accuracy": min(accuracy),
                "largest accuracy": max(accuracy),
                "useful before": float(np.mean([values(row, "useful_share")[0] for row in rows])),
                "useful after": float(np.mean(ends["useful_share"])),
                "least useful": min(ends["useful_share"]),
                "largest useful": max(ends["useful_share"]),
                "mixed NLL": float(np.mean(ends["mixed_nll"])),
                "told accuracy": float(np.mean([row["told_accuracy"] for row in rows])),
            }
        )
    return found
