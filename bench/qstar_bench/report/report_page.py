"""Runs as one HTML page: a summary of their ratios, then plots and tables of each run.

The page stands alone: its style is inside, its plots are SVG elements, and its own policy forbids scripts and
the network. All text of a run is escaped.
"""

import json
from html import escape
from typing import Any

from qstar_bench.report import run_plots

NOT_MEASURED = "a model, not a measurement"
# bench: the columns that are computed from a model of the machine; None: all of them
MODELLED: dict[str, tuple[str, ...] | None] = {
    "kernels": ("model us",),
    "memory plan": None,
    "memory profile": ("plan MiB",),
}
COMMON = ("bench", "when", "machine", "arguments", "rows")  # what every run has beside its own figures

HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>qstar bench report</title>
<style>
:root { --ink: #1b1f24; --paper: #fff; --faint: #59636e; --line: #d5dae0; --box: #f5f7f9; --link: #0b5cad;
  --warn: #8a4b00; --warn-box: #fff3e0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --paper: #14171b; --faint: #9aa4af;
  --line: #363d46; --box: #1d2127; --link: #74b3f5; --warn: #ffc679; --warn-box: #33260f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1.2rem; margin: 0; }
p { margin: .2rem 0; }
a { color: var(--link); }
section { margin-top: 1.5rem; padding-top: 1.2rem; border-top: 1px solid var(--line); }
figure { margin: 1rem 0 0; }
figcaption, .faint { color: var(--faint); font-size: .8rem; line-height: 1.4; }
figcaption b { color: var(--ink); font-size: .9rem; }
.modelled { display: inline-block; padding: .05rem .5rem; border-radius: .3rem; font-size: .8rem;
  color: var(--warn); background: var(--warn-box); }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); }
.plots svg { display: block; width: 100%; max-width: 34rem; height: auto; font-family: inherit; }
.scroll { margin-top: .4rem; overflow-x: auto; max-width: 100%; border: 1px solid var(--line);
  border-radius: .4rem; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; overflow-wrap: normal;
  font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
td { max-width: 24rem; }
th { background: var(--box); border-top: 0; vertical-align: bottom; }
.number { text-align: right; white-space: nowrap; }
.words { white-space: nowrap; }
td:not(.words, .number) { overflow-wrap: anywhere; min-width: 5rem; }
</style>
</head>
<body>
"""


def page(runs: list[dict[str, Any]]) -> str:
    """The whole document."""
    sections = "".join(section(i, run) for i, run in enumerate(runs, 1))
    count = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    across = drawn(run_plots.strategies(runs), "all")
    if across:
        across = f"<p>{label(NOT_MEASURED)}</p>\n{across}"
    return f"{HEAD}<h1>qstar bench</h1>\n{summary(runs, count)}{across}{sections}</body>\n</html>\n"


def summary(runs: list[dict[str, Any]], count: str) -> str:
    """Tabulate the ratios of all runs, each with a link to its run."""
    rows = []
    for i, run in enumerate(runs, 1):
        link = f'<a href="#run-{i}">{escape(run["bench"])}</a>'
        modelled = f" {label(NOT_MEASURED)}" if _all_modelled(run) else ""
        for name, value in ratios(run):
            cells = f'<td class="words">{link}{modelled}</td><td>{_breakable(name)}</td>'
            rows.append(f'<tr>{cells}<td class="number">{escape(value)}</td></tr>\n')
    if not rows:
        links = ", ".join(f'<a href="#run-{i}">{escape(run["bench"])}</a>' for i, run in enumerate(runs, 1))
        return f'<p class="faint">{count}: {links}</p>\n'
    head = '<tr><th>run</th><th>ratio</th><th class="number">value</th></tr>\n'
    caption = (
        f"<figcaption><b>Ratios</b> of {count}; over several cases the lowest and the highest</figcaption>"
    )
    return f"<figure>{caption}\n{_scroll('Ratios', head, ''.join(rows))}</figure>\n"


def _breakable(name: str) -> str:
    """Let the long names of ratios wrap on a phone."""
    return escape(name).replace("_", "_<wbr>")


def ratios(run: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value as text) of the figures by which a run is judged: its own numbers that are no counts, and
    the named ratios of its cases."""
    found: dict[str, list[float]] = {}
    for name, figure in run.items():
        if name not in COMMON and isinstance(figure, float):
            found[name] = [figure]
        for case in figure if name not in COMMON and isinstance(figure, list) else ():
            for key, value in case.items() if isinstance(case, dict) else ():
                if ("_vs_" in key or "speedup" in key) and run_plots.number(value):
                    found.setdefault(key, []).append(value)
    told = []
    for name, values in found.items():
        low, high = show(min(values)), show(max(values))
        told.append((name, low if low == high else f"{low} to {high} ({len(values)} cases)"))
    return told


def section(i: int, run: dict[str, Any]) -> str:
    """Show one run: plots, then its rows and its other figures as tables."""
    name = escape(run["bench"])
    modelled = f"<p>{label(NOT_MEASURED)}</p>\n" if _all_modelled(run) else ""
    tables = "".join(table(run, title, rows, j == 0) for j, (title, rows) in enumerate(tables_of(run)))
    when = f'<p class="faint">{escape(run["when"])}</p>\n'
    drawings = drawn(run_plots.of_run(run), f"run-{i}")
    return f'<section id="run-{i}">\n<h2>{name}</h2>\n{when}{modelled}{drawings}{tables}</section>\n'


def drawn(found: list[run_plots.Plot], name: str) -> str:
    """name: unique on the page."""
    boxes = [f"<div>{run_plots.svg(plot, f'{name}-{i}')}</div>\n" for i, plot in enumerate(found)]
    return f'<figure class="plots">\n{"".join(boxes)}</figure>\n' if boxes else ""


def tables_of(run: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(title, rows): the run's rows, its single figures, then each figure that is a table of its own."""
    single, found = [], []
    for name, figure in run.items():
        if name in COMMON or figure is None:
            continue
        if isinstance(figure, dict):
            nested = figure and all(isinstance(x, dict) for x in figure.values())
            found.append((name, [{"": key} | x for key, x in figure.items()] if nested else [figure]))
        elif isinstance(figure, list):
            found.append((name, [x if isinstance(x, dict) else {name: x} for x in figure]))
        else:
            single.append({"figure": name, "value": figure})
    rows = [{key: x for key, x in row.items() if not is_run(x)} for row in run["rows"]]
    found = [(name, [{k: x for k, x in row.items() if not is_run(x)} for row in rs]) for name, rs in found]
    return [("rows", rows), *((t, rs) for t, rs in [("figures", single), *found] if rs and rs != rows)]


def is_run(x: Any) -> bool:
    """Tell whether x has the shape of the document that `qstar.reporting.benchmark_record.finish` prints."""
    kinds = {"bench": str, "when": str, "machine": dict, "arguments": dict, "rows": list}
    shaped = isinstance(x, dict) and all(isinstance(x.get(name), kind) for name, kind in kinds.items())
    return shaped and all(isinstance(row, dict) for row in x["rows"])


def table(run: dict[str, Any], title: str, rows: list[dict[str, Any]], first: bool) -> str:
    """Rows, which may differ in their columns, in a box of their own that scrolls."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    numeric = {c for c in columns if all(isinstance(r.get(c), (int, float, type(None))) for r in rows)}
    modelled = MODELLED.get(run["bench"], ()) or ()
    head = ""
    for column in columns:
        mark = f" {label('a model')}" if column in modelled else ""
        head += f'<th class="{"number" if column in numeric else "words"}">{escape(column)}{mark}</th>'
    body = ""
    for row in rows:
        cells = (cell(row.get(column), column in numeric) for column in columns)
        body += f"<tr>{''.join(cells)}</tr>\n"
    name = run["bench"] if title == "rows" else f"{run['bench']}: {title}"
    marked = [column for column in columns if column in modelled]
    warning = ""
    if _all_modelled(run) or marked:
        warning = f" {label(': '.join([*([', '.join(marked)] if marked else []), NOT_MEASURED]))}"
    caption = f"<figcaption><b>{escape(name)}</b>{warning}\n{_provenance(run, first)}</figcaption>"
    return f"<figure>{caption}\n{_scroll(name, f'<tr>{head}</tr>', body)}</figure>\n"


def _provenance(run: dict[str, Any], opened: bool) -> str:
    facts = [run["when"], *(f"{name} {show(value)}" for name, value in run["machine"].items())]
    options = [f"{name} {show(value)}" for name, value in run["arguments"].items() if value is not None]
    first = f"<div>{escape('; '.join(facts))}</div>"
    return (
        f"{first}<details{' open' if opened else ''}><summary>arguments</summary>"
        f"{escape('; '.join(options) or 'none')}</details>"
    )


def _scroll(name: str, head: str, body: str) -> str:
    """Put a table into a box that scrolls by itself, by keyboard too."""
    box = f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(name)}">'
    return f"{box}<table>\n<thead>{head}</thead>\n<tbody>\n{body}</tbody></table></div>"


def label(text: str) -> str:
    return f'<span class="modelled">{escape(text)}</span>'


def _all_modelled(run: dict[str, Any]) -> bool:
    return MODELLED.get(run["bench"], ()) is None


def cell(value: Any, numeric: bool) -> str:
    text = show(value)
    kind = "number" if numeric else "words" if len(text) < 40 else "text"
    return f'<td class="{kind}">{escape(text)}</td>'


def show(value: Any) -> str:
    """Show a value as text: numbers to three digits or all before the point, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e12 else f"{value:.3g}"
    if isinstance(value, list) and not any(isinstance(x, (list, dict)) for x in value):
        return ", ".join(show(x) for x in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
