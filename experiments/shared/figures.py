"""Draw the figures of the studies in one style."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qstar_bench.report.run_plots import style

from experiments.shared.comparison import Row, Runs


@contextmanager
def drawing(path: Path, down: int, across: int, size: tuple[float, float]) -> Iterator[tuple[Any, Any]]:
    """Yield a matplotlib figure of that size in inches and its axes [down, across]; then save it as a PNG."""
    with style("black") as pyplot:
        figure, axes = pyplot.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
        yield figure, axes
        figure.savefig(path, dpi=100)
        pyplot.close(figure)


def bars(axis: Any, conditions: list[Row], runs: Runs, thinks: set[str]) -> None:
    """Draw a bar with its interval for each condition, blue where it `thinks`, and a dot for every run."""
    for at, row in enumerate(conditions):
        axis.barh(at, row["mean"], color="C0" if row["condition"] in thinks else "lightgray")
        axis.plot([row["low"], row["high"]], [at, at], color="black", linewidth=1)
        values = list(runs[row["condition"]].values())
        axis.plot(values, [at] * len(values), "o", color="C1", markersize=4, alpha=0.7)
    axis.set_yticks(range(len(conditions)), [row["condition"] for row in conditions])
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set_axisbelow(True)
