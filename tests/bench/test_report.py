"""`qstar bench report`: what the page says, what it refuses, and how it looks on a phone."""

import json
import re

import pytest
from browser import PHONE, Browser
from qstar_bench.report import run_plots
from qstar_bench.report.report_command import main

from qstar.cli.main import main as command_line

HOSTILE = "<script>console.error('run')</script><img src=https://example.org/x.png>"


def a_run(bench="test", rows=({"name": "a", "value": 1.5},), **figures):
    """A document as `qstar.reporting.benchmark_record.finish` makes it."""
    machine = {"device": "cpu (Some Processor)", "threads": 2, "torch": "2.13.0", "commit": "abc1234+"}
    return {
        "bench": bench,
        "when": "2026-03-04T05:06:07+00:00",
        "machine": machine,
        "arguments": {"preset": "small", "tokens": 12345, "plot": None},
        **figures,
        "rows": list(rows),
    }


def attention(**figures):
    sizes = [(T, L) for T in (64, 256) for L in (1, 4, 16)]
    shape = [{"T": T, "N": T, "L": L} for T, L in sizes]
    measured = [{"median ms": 1e-3 * T * L, "memory MiB": 1e-2 * T * L} for T, L in sizes]
    rows = [
        {**x, "candidate": name, "pass": what, **y}
        for x, y in zip(shape, measured)
        for name in ("ours", "causal")
        for what in ("forward", "both")
    ]
    return a_run("attention", rows, **figures)


def step():
    rows = [
        {"way": "ours", "dtype": "float32", "median s a step": 1.0, "peak GiB": 0.5},
        {"way": "plain", "dtype": "float32", "median s a step": 0.2, "peak GiB": 0.25},
    ]
    phases = [
        {"way": "ours", "dtype": "float32", "prefix": 0.2, "blocks": 0.5},
        {"way": "plain", "dtype": "float32", "backward": 0.3},
    ]
    return a_run("step", rows, phases=phases, price_of_thinking=5.0)


def write(path, *runs):
    path.write_text("".join(json.dumps(run) + "\n" for run in runs), encoding="utf-8")
    return str(path)


def report(tmp_path, *runs, options=()):
    """The page of these runs."""
    output = tmp_path / "report.html"
    assert main([write(tmp_path / "runs.jsonl", *runs), "-o", str(output), *options]) == 0
    return output.read_text(encoding="utf-8")


def test_every_table_says_bench_date_machine_versions_commit_and_arguments(tmp_path):
    page = report(tmp_path, a_run(costs=[{"GFLOP": 3}]), a_run("other"))
    captions = re.findall(r"<figcaption>.*?</figcaption>(?=\n<div class=\"scroll\")", page, re.S)
    assert len(captions) == 3 == page.count("<table>")
    for caption, name in zip(captions, ("test", "test: costs", "other")):
        assert f"<b>{name}</b>" in caption
        for fact in ("2026-03-04T05:06:07", "cpu (Some Processor)", "threads 2", "torch 2.13.0", "abc1234+"):
            assert fact in caption
        assert "preset small; tokens 12,345<" in caption  # and what was not given is left out


def test_rows_of_any_bench_are_a_table_whatever_their_columns(tmp_path):
    page = report(tmp_path, a_run(rows=[{"a": 1, "b": None}, {"b": 0.000123456, "c": [1, {"d": 2}]}]))
    heads = re.findall(r"<th [^>]*>(.*?)</th>", page)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(<td.*?)</tr>", page)]
    assert heads == ["a", "b", "c"]
    assert cells == [["1", "", ""], ["", "0.000123", "[1, {&quot;d&quot;: 2}]"]]


def test_named_ratios_are_on_top_and_a_range_over_the_cases(tmp_path):
    cases = [{"T": 64, "fwd_bwd_vs_causal": 1.25}, {"T": 256, "fwd_bwd_vs_causal": 0.75}, {"x_vs_y": None}]
    page = report(tmp_path, attention(cases=cases), a_run("generate", speedup_vs_recompute=20.6))
    summary = page[: page.index("<section")]
    assert (
        '<td>fwd_<wbr>bwd_<wbr>vs_<wbr>causal</td><td class="number">0.75 to 1.25 (2 cases)</td>' in summary
    )
    assert '<td>speedup_<wbr>vs_<wbr>recompute</td><td class="number">20.6</td>' in summary
    assert 'href="#run-2"' in summary and '<section id="run-2">' in page
    assert "x_<wbr>vs_<wbr>y" not in summary


@pytest.mark.parametrize(
    ("run", "modelled"),
    [
        (a_run("kernels", [{"kernel": "forward", "registers": 128, "model us": 3.5}]), True),
        (a_run("memory plan", [{"highest moment": "rollout", "total MiB": 5.0, "K/V": 5.0}]), True),
        (a_run("generate", [{"way": "plain", "model steps a token": 1.0}]), False),
    ],
    ids=lambda x: x["bench"] if isinstance(x, dict) else "",
)
def test_modelled_figures_are_called_that_and_no_others(tmp_path, run, modelled):
    assert ("a model, not a measurement" in report(tmp_path, run)) == modelled


def test_runs_inside_a_run_are_sections_of_their_own(tmp_path):
    stages = [{"stage": "step", "failed": None, "result": step()}, {"stage": "tests", "failed": "no GPU"}]
    page = report(tmp_path, a_run("gpu", stages=stages, passed=False))
    assert re.findall("<h2>(.*?)</h2>", page) == ["gpu", "step"]
    assert "no GPU" in page and "&quot;rows&quot;" not in page


def test_one_document_over_many_lines_is_a_run_too(tmp_path):
    (tmp_path / "gpu.json").write_text(json.dumps(a_run("gpu"), indent=1))
    assert main([str(tmp_path / "gpu.json"), "-o", str(tmp_path / "r.html")]) == 0
    assert "<h2>gpu</h2>" in (tmp_path / "r.html").read_text()


def test_the_plots_of_known_benches_show_their_rows(tmp_path):
    found = {plot.title.removeprefix("forward + backward: "): plot for plot in run_plots.of_run(attention())}
    assert list(found) == [
        "time over all slots",
        "memory over all slots",
        "time over the slots of a block",
        "memory over the slots of a block",
    ]
    assert found["memory over all slots"].series["T 64"] == [(64, 0.64), (256, 2.56), (1024, 10.24)]
    assert [x for x, _ in found["time over the slots of a block"].series["T 256"]] == [1, 4, 16]
    phases, memory = run_plots.of_run(step())
    assert phases.names == ("ours float32", "plain float32")
    assert phases.series == {"prefix": [(0, 0.2)], "blocks": [(0, 0.5)], "backward": [(1, 0.3)]}
    assert memory.series == {"peak GiB": [(0, 0.5), (1, 0.25)]}
    page = report(tmp_path, attention(), step(), options=["--plots", str(tmp_path / "plots")])
    assert page.count("<svg ") == 6
    assert {x.name for x in (tmp_path / "plots").iterdir()} == {"1-attention.png", "2-step.png"}


def test_the_strategies_of_several_plans_are_drawn_beside_each_other(tmp_path):
    plans = []
    for strategy, nbytes in (("adamw", 4.0), ("lora", 1.0)):
        rows = [
            {"highest moment": "rollout", "total MiB": nbytes, "K/V": nbytes},
            {
                "highest moment": "peak (in loss)",
                "total MiB": 3 * nbytes,
                "K/V": nbytes,
                "logits": 2 * nbytes,
            },
        ]
        plans.append(a_run("memory plan", rows))
        plans[-1]["arguments"]["strategy"] = strategy
    (plot,) = run_plots.strategies(plans)
    assert [name.split()[0] for name in plot.names] == ["adamw", "lora"]
    assert plot.series == {"K/V": [(0, 4.0), (1, 1.0)], "logits": [(0, 8.0), (1, 2.0)]}
    assert run_plots.strategies(plans[:1]) == []
    assert report(tmp_path, *plans).count("<svg ") == 3


@pytest.mark.parametrize("bench", list(run_plots.PLOTS))
def test_rows_without_what_a_plot_needs_give_no_plot(tmp_path, bench):
    odd = a_run(bench, [{}, {"T": "x", "N": 1, "L": [], "pass": "both", "candidate": "ours"}, {"over": "k"}])
    assert "<svg" not in report(tmp_path, odd, a_run(bench, []))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "runs.jsonl: is empty"),
        ("\n \n", "runs.jsonl: is empty"),
        (json.dumps(a_run()) + "\n\n{'a': 1}\n", "runs.jsonl, line 3: is no JSON"),
        (json.dumps(a_run()) + '\n{"a": 1}', "runs.jsonl, line 2: is no run of a bench"),
        ("[1, 2]", "runs.jsonl: is no run of a bench"),
        (json.dumps(a_run(rows=["text"])), "runs.jsonl: is no run of a bench"),
        (json.dumps(a_run() | {"machine": None}), "runs.jsonl: is no run of a bench"),
        ("\udcff", "runs.jsonl: is no text in UTF-8"),
    ],
)
def test_a_file_that_holds_no_runs_is_refused_in_one_line(tmp_path, capsys, text, reason):
    (tmp_path / "runs.jsonl").write_text(text, encoding="utf-8", errors="surrogateescape")
    output = tmp_path / "report.html"
    assert command_line(["bench", "report", str(tmp_path / "runs.jsonl"), "-o", str(output)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
    assert not output.exists()


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ([], "the following arguments are required: RUN.jsonl"),
        (["nowhere.jsonl"], "nowhere.jsonl: there is no such file"),
        (["x.jsonl", "--colour", "red"], "unrecognized arguments: --colour red"),
        (["x.jsonl", "-o", "/nowhere/r.html"], "output = /nowhere/r.html: its folder does not exist"),
        (["x.jsonl", "--plots", "/nowhere/p"], "plots = /nowhere/p: its folder does not exist"),
    ],
)
def test_bad_arguments_are_named(argv, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        main(argv)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A page with plots, wide tables, long words, and markup in every text that a run may hold."""
    folder = tmp_path_factory.mktemp("page")
    run = attention(cases=[{"T": 64, "fwd_bwd_vs_causal": 1.25}], **{f"{HOSTILE}_vs_x": 2.0})
    run["machine"] |= {"device": HOSTILE, HOSTILE: "x" * 300}
    run["arguments"] |= {"prompt": "word " * 200, HOSTILE: "$\\frac{}$"}
    run["rows"] += [
        row | {"candidate": "ours", HOSTILE: HOSTILE, **{f"column {i}": i for i in range(30)}}
        for row in run["rows"][:2]
    ]
    other = step()
    other["rows"][0]["way"] = other["phases"][0]["way"] = f"$\\way$ {HOSTILE}"
    other["bench"], other["when"] = "step", HOSTILE
    report(folder, run, other, a_run(HOSTILE))
    return folder / "report.html"


def test_text_of_a_run_is_escaped(hostile):
    page = hostile.read_text(encoding="utf-8")
    assert "&lt;script&gt;console.error" in page
    assert "<script" not in page and "<img" not in page


@pytest.fixture(scope="module")
def opened(hostile, tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        browser.open(hostile)
        yield browser


def test_in_a_browser_nothing_is_run_refused_or_fetched(opened, hostile):
    assert opened.run("return document.title") == "qstar bench report"
    assert opened.run("return document.querySelectorAll('script, img, link, iframe').length") == 0
    assert HOSTILE in opened.run("return document.querySelector('figcaption div').textContent")
    assert opened.requests() == [hostile.as_uri()]
    assert opened.console() == []


def test_on_a_phone_only_the_tables_scroll_sideways(opened):
    assert opened.run("return innerWidth") == PHONE["width"]
    assert opened.run("return document.documentElement.scrollWidth") == PHONE["width"]
    assert opened.run("scrollTo(500, 0); return scrollX") == 0
    wide = "[...document.querySelectorAll('.scroll')].filter(x => x.scrollWidth > x.clientWidth)"
    assert opened.run(f"return {wide}.length") > 0
    assert opened.run(f"return {wide}.map(x => (x.scrollLeft = 50, x.scrollLeft))[0]") == 50
    outside = "getBoundingClientRect().right > innerWidth"
    inside = "h1, h2, p, figcaption, .scroll, svg"
    assert (
        opened.run(f"return [...document.querySelectorAll('{inside}')].filter(x => x.{outside}).length") == 0
    )


def test_the_values_of_the_summary_are_seen_on_a_phone(opened):
    summary = "document.querySelector('.scroll')"
    assert opened.run(f"return {summary}.getAttribute('aria-label')") == "Ratios"
    assert opened.run(f"return {summary}.scrollWidth - {summary}.clientWidth") == 0


def test_plots_fill_the_width_of_a_phone_in_legible_letters(opened):
    sizes = "[...document.querySelectorAll('svg')].map(x => x.getBoundingClientRect().width)"
    assert min(opened.run(f"return {sizes}")) > 0.8 * PHONE["width"]
    letters = "[...document.querySelectorAll('svg text')].map(x => x.getBoundingClientRect().height)"
    assert min(opened.run(f"return {letters}")) >= 9


def test_dark_mode_turns_page_and_plots(opened, tmp_path):
    colours = (
        "return [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,"
        " getComputedStyle(document.querySelector('svg text')).fill].map(x =>"
        " x.match(/\\d+/g).map(Number).reduce((a, b) => a + b))"
    )
    found = {}
    for scheme in ("light", "dark"):
        opened.colours(dark=scheme == "dark")
        found[scheme] = opened.run(colours)
    paper, ink, plot = found["light"]
    assert paper > 600 and ink < 150 and plot < 150
    paper, ink, plot = found["dark"]
    assert paper < 150 and ink > 600 and plot > 600
