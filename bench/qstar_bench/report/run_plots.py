"""Plots of a run, made from its document alone: the same for the report, for `--plot` and for the docs.

A bench that is not known here has none; a row that lacks what a plot needs is left out of it.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from io import StringIO
from operator import itemgetter
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Series = dict[str, list[tuple[float, float]]]

INK = "#010203"  # in an SVG: stands for the text colour of the page around it
INCHES = (4.6, 3.1)
LONGEST_NAME = 26
SETTINGS = {
    "text.parse_math": False,  # a name may hold a $
    "svg.fonttype": "none",  # text stays text: it can be found, read aloud, and takes the page's font
    "svg.hashsalt": "qstar",  # the same rows give the same bytes
    "font.size": 10,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
COLOURS = ("#2f7ed8", "#e4720b", "#2ca25f", "#c0399f", "#8a6bd1", "#b08900", "#d64545", "#3aa6b9")


@dataclass(frozen=True)
class Plot:
    """series: name to its points (x, y), as lines; or, with `names`, y as bars, one for each name at
    x = 0, 1, ..., in a row or beside each other."""

    title: str
    x: str
    y: str
    series: Series
    log: bool = False
    names: tuple[str, ...] | None = None
    beside: bool = False


def of_run(run: dict[str, Any]) -> list[Plot]:
    """Choose the plots of a run; none for an unknown bench."""
    draw = PLOTS.get(run["bench"])
    return [] if draw is None else draw(run)


def number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def lines(rows: Iterable[Row], x: Callable[[Row], Any], y: str, by: Callable[[Row], Any]) -> Series:
    """Make a line for each value of `by`, through the rows that have both numbers, in the order of x."""
    found: Series = {}
    for row in rows:
        if number(x(row)) and number(row.get(y)):
            found.setdefault(str(by(row)), []).append((x(row), row[y]))
    return {name: sorted(line) for name, line in found.items()}


def bars(title: str, y: str, rows: list[Row], columns: tuple[str, ...] = (), beside: bool = False) -> Plot:
    """Make bars for each row, of its columns (default: all that hold numbers), named by the words in it."""
    columns = columns or tuple(
        dict.fromkeys(name for row in rows for name, value in row.items() if number(value))
    )
    series: Series = {
        name: [(i, row[name]) for i, row in enumerate(rows) if number(row.get(name))] for name in columns
    }
    names = tuple(" ".join(value for value in row.values() if isinstance(value, str)) for row in rows)
    return Plot(title, "", y, {name: x for name, x in series.items() if x}, names=names, beside=beside)


def worth(plots: Iterable[Plot]) -> list[Plot]:
    """Keep the plots with a bar, or with a line of two points."""
    fewest = {True: 1, False: 2}
    return [
        plot
        for plot in plots
        if any(len({x for x, _ in line}) >= fewest[plot.names is not None] for line in plot.series.values())
    ]


def attention(run: dict[str, Any]) -> list[Plot]:
    """Plot time and memory of our forward + backward over the slots and over a block's slots, a line for each
    T; and every candidate over T where one L was measured at several."""
    rows = [row for row in run["rows"] if all(number(row.get(name)) for name in ("T", "N", "L"))]
    both = [row for row in rows if row.get("pass") == "both"]
    ours = [row for row in both if row.get("candidate") == "ours"]
    xs: dict[str, tuple[str, Callable[[Row], Any]]] = {
        "all slots": ("slots N * L", lambda row: row["N"] * row["L"]),
        "the slots of a block": ("slots of a block, L", itemgetter("L")),
    }
    found = []
    for over, (label, x) in xs.items():
        for y, name, unit in (
            ("median ms", "time", "ms"),
            ("memory MiB", "memory", "peak extra memory, MiB"),
        ):
            series = lines(ours, x, y, lambda row: f"T {row['T']}")
            found.append(Plot(f"forward + backward: {name} over {over}", label, unit, series, log=True))
    if len({row["L"] for row in both}) == 1:
        series = lines(both, itemgetter("T"), "median ms", lambda row: row.get("candidate"))
        found.append(Plot("forward + backward: time over the tokens", "tokens T", "ms", series, log=True))
    return worth(found)


def step(run: dict[str, Any]) -> list[Plot]:
    """Plot the seconds of each phase, stacked, and the peak memory of each way."""
    phases = [row for row in run.get("phases") or [] if isinstance(row, dict)]
    return worth(
        [
            bars("phases of a step", "s a step", phases),
            bars("memory of a step", "peak, GiB", run["rows"], ("peak GiB",)),
        ]
    )


def scaling(run: dict[str, Any]) -> list[Plot]:
    """Plot time and memory over each knob, a line for each way."""
    found = []
    knobs = {"k": "thought length k", "R": "thoughts a position, R", "positions": "positions that think"}
    for knob, label in knobs.items():
        rows = [row for row in run["rows"] if row.get("over") == knob and knob in row and "way" in row]
        for y, name, unit in (("median s", "time", "s a step"), ("memory MiB", "memory", "peak, MiB")):
            series = lines(rows, itemgetter(knob), y, itemgetter("way"))
            found.append(Plot(f"{name} over {knob}", label, unit, series))
    return worth(found)


def data(run: dict[str, Any]) -> list[Plot]:
    """Plot the loader's memory over what it has read, a line for each number of workers, and its speed."""
    points = [row for row in run.get("memory") or [] if isinstance(row, dict)]
    series = lines(points, itemgetter("read MiB"), "memory MiB", lambda row: f"{row.get('workers')} workers")
    speed = [{"": f"{row.get('workers')} workers"} | row for row in run["rows"]]
    return worth(
        [
            Plot("memory of a stream's loader", "MiB of text read", "MiB", series),
            bars("speed of a stream's loader", "tokens a second", speed, ("tokens/s",)),
        ]
    )


def memory_plan(run: dict[str, Any]) -> list[Plot]:
    """Plot what is held at the highest moment of each phase, by category."""
    return worth([bars("planned memory of a step", _unit(run), _categories(run))])


def memory_profile(run: dict[str, Any]) -> list[Plot]:
    """Plot the plan of each phase beside what was measured."""
    columns = ("plan MiB", "measured MiB")  # resident memory has the libraries in it, and would hide both
    return worth([bars("memory, planned and measured", "MiB", run["rows"], columns, beside=True)])


def strategies(runs: list[dict[str, Any]]) -> list[Plot]:
    """The highest moment of every plan of the runs, beside each other by what it is a plan of."""
    plans = [run for run in runs if run["bench"] == "memory plan" and _categories(run)]
    rows = []
    for run in plans:
        scale = 1024 if _unit(run) == "GiB" else 1
        highest = max(_categories(run), key=lambda row: sum(filter(number, row.values())))
        named = {name: str(run["arguments"].get(name, "")) for name in ("strategy", "precision")}
        rows.append(named | {name: scale * x for name, x in highest.items() if number(x)})
    return worth([bars("planned peak memory of each strategy", "MiB", rows)]) if len(rows) > 1 else []


def _categories(run: dict[str, Any]) -> list[Row]:
    """The rows that have a total, without it: the categories are its parts."""
    rows = [row for row in run["rows"] if any(name.startswith("total") for name in row)]
    return [{name: x for name, x in row.items() if not name.startswith("total")} for row in rows]


def _unit(run: dict[str, Any]) -> str:
    return "GiB" if any("total GiB" in row for row in run["rows"]) else "MiB"


PLOTS: dict[str, Callable[[dict[str, Any]], list[Plot]]] = {
    "attention": attention,
    "data": data,
    "memory plan": memory_plan,
    "memory profile": memory_profile,
    "scaling": scaling,
    "step": step,
}


def svg(plot: Plot, name: str) -> str:
    """The plot as an element of a page, in the page's text colour; name: unique on the page."""
    with style(INK) as pyplot:
        figure, axis = pyplot.subplots(figsize=INCHES, layout="constrained")
        draw(axis, plot)
        text = StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    found = text.getvalue()
    found = found[found.index("<svg") :].replace(INK, "currentColor")
    found = re.sub(r"<metadata>.*?</metadata>", "", found, flags=re.DOTALL)
    found = re.sub(r' (width|height)="[\d.]+pt"', "", found, count=2)  # the page decides
    found = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", found)  # ids hold for the whole page
    label = escape(f"{plot.title}: {plot.y} over {plot.x or 'the ways'}")
    return found.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def save(plots: list[Plot], path: str | Path) -> None:
    """Save all plots of a run, two beside each other, as one PNG. Raises ValueError where there is none."""
    if not plots:
        raise ValueError(f"plot = {path}: there is nothing to draw in this run")
    down, across = math.ceil(len(plots) / 2), min(2, len(plots))
    with style("black") as pyplot:
        size = across * INCHES[0], down * INCHES[1]
        figure, axes = pyplot.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
        for axis, plot in zip(axes.flat, plots):
            draw(axis, plot)
        for axis in axes.flat[len(plots) :]:
            axis.set_visible(False)
        figure.savefig(path, dpi=110)
        pyplot.close(figure)


@contextmanager
def style(ink: str) -> Iterator[Any]:
    """matplotlib's pyplot, without a screen, with our settings for a while."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.rcsetup import cycler

    inks = (
        "text.color",
        "axes.edgecolor",
        "axes.labelcolor",
        "axes.titlecolor",
        "xtick.color",
        "ytick.color",
    )
    settings: dict[Any, Any] = SETTINGS | dict.fromkeys(inks, ink)
    with pyplot.rc_context(settings | {"axes.prop_cycle": cycler(color=COLOURS)}):
        yield pyplot


def draw(axis: Any, plot: Plot) -> None:
    """Draw the plot on an axis of matplotlib; long names are cut, else they would push it out of the
    figure."""

    def short(name: str) -> str:
        name = name.replace("qstar.", "")  # of phases
        return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"

    if plot.names is not None:
        ends = [0.0] * len(plot.names)
        width = 0.7 / len(plot.series) if plot.beside else 0.6
        for at, (name, stack) in enumerate(plot.series.items()):
            shift = (at - (len(plot.series) - 1) / 2) * width if plot.beside else 0
            begins = [0.0 if plot.beside else ends[int(i)] for i, _ in stack]
            axis.barh([i + shift for i, _ in stack], [y for _, y in stack], width, begins, label=short(name))
            for i, y in stack:
                ends[int(i)] += y
        axis.set_yticks(range(len(plot.names)), [*map(short, plot.names)])
        axis.set_ylim(max(3, len(plot.names)) - 0.5, -0.5)  # the first on top
        axis.grid(axis="y", visible=False)
        axis.set_axisbelow(True)
        axis.set_xlabel(plot.y)
    else:
        for name, line in plot.series.items():
            axis.plot(*zip(*line), marker="o", markersize=4, label=short(name))
        if plot.log and all(x > 0 and y > 0 for line in plot.series.values() for x, y in line):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_major_formatter("{x:g}")
        else:
            axis.set_ylim(bottom=0)
            axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel(plot.x)
        axis.set_ylabel(plot.y)
    axis.set_title(plot.title, fontsize="medium")
    below = {"loc": "upper center", "bbox_to_anchor": (0.4, -0.2), "ncols": 3}  # bars leave no room inside
    if len(plot.series) > 1:
        axis.legend(fontsize="small", framealpha=0, **({} if plot.names is None else below))
