"""Show what a person reads, tables that paste into an issue, and what a machine reads, one line of JSON."""

import json
from typing import Any

from tabulate import tabulate


def table(rows: list[dict[str, Any]], digits: int = 4) -> str:
    """Return rows with the same keys as a Markdown table."""
    return tabulate(rows, headers="keys", tablefmt="github", floatfmt=f".{digits}f", missingval="")


def intervals(rows: list[dict[str, Any]], headers: dict[str, str], digits: int) -> str:
    """Return the rows of `evaluation.condition_tables` as a Markdown table.

    headers: a column's name by metric. A cell is a mean and its interval; differences have a sign.
    """
    shown = []
    for row in rows:
        kind, sign = ("condition", "") if "condition" in row else ("difference", "+")
        line = {kind: row[kind], "N": row["n"]}
        for metric, header in headers.items():
            if f"{metric}_n" in row:
                line[f"N, {metric}"] = row[f"{metric}_n"]
            line[header] = row[metric]
            if f"{metric}_low" in row:
                mean, low, high = (f"{row[metric + end]:{sign}.{digits}f}" for end in ("", "_low", "_high"))
                line[header] = f"{mean} [{low}, {high}]"
        shown.append(line)
    return table(shown, digits)


def last_line(figures: dict[str, Any]) -> None:
    """Print the figures as one line of JSON, the last line of every command's stdout."""
    print(json.dumps(figures, ensure_ascii=False), flush=True)
