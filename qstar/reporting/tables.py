"""What a person looks at: tables that paste into an issue, curves, and one JSON document for machines."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tabulate import tabulate

CURVES = (
    ("loss", "loss"),
    ("base_nll", "base NLL (nats)"),
    ("mixed_nll", "mixed NLL (nats)"),
    ("reward_mean", "mean reward (nats)"),
    ("mix_weight_mean", "mean mixing weight"),
    ("policy_loss", "policy loss (unweighted)"),
)


def table(rows: list[dict[str, Any]], digits: int = 4) -> str:
    """Rows with the same keys as a Markdown table."""
    return tabulate(rows, headers="keys", tablefmt="github", floatfmt=f".{digits}f", missingval="")


def check_folder(name: str, path: str | os.PathLike | None) -> None:
    """Raises ValueError, naming the option, for a file to be written in a folder that does not exist: before
    hours of work, not after them."""
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise ValueError(f"{name} = {path}: its folder does not exist")


def before_after(before: dict[str, float], after: dict[str, float]) -> str:
    """The held-out figures before and after training, one a line."""
    rows = [
        {"held out": name, "before": before[name], "after": after[name]}
        for name in before
        if name != "tokens"
    ]
    return table(rows) + f"\n({before['tokens']} tokens; NLL in nats per token)"


def last_line(figures: dict[str, Any]) -> None:
    """Print the figures as one line of JSON: the last line of every command's stdout."""
    print(json.dumps(figures, ensure_ascii=False), flush=True)


def save_curves(log_history: list[dict[str, float]], path: str | Path) -> bool:
    """Draw the logged curves over steps as a PNG; False when nothing was logged."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    logged = [entry for entry in log_history if "loss" in entry]
    curves = [(key, label) for key, label in CURVES if any(key in entry for entry in logged)]
    if not curves:
        return False
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6), sharex=True, layout="constrained")
    for axis, (key, label) in zip(axes.flat, curves):
        points = [(entry["step"], entry[key]) for entry in logged if key in entry]
        axis.plot(*zip(*points))
        axis.set_title(label)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    for axis in list(axes.flat)[len(curves) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
