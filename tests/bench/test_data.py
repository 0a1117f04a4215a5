"""`qstar bench data` reads what it wrote in every way alike, before it shows a figure."""

import json
import sys

import pytest
from qstar_bench import data_command
from qstar_bench.data_command import POINTS, DataBenchArguments, main

from qstar.reporting.benchmark_record import WrongResultError


@pytest.mark.parametrize(
    "options",
    [["--kind", "json.gz"], pytest.param(["--spans", "random"], marks=pytest.mark.slow)],
    ids=" ".join,
)
def test_the_command_ends_with_its_run(capsys, tmp_path, options):
    plot, runs = tmp_path / "plot.png", tmp_path / "runs.jsonl"
    more = ["--plot", str(plot), "--append", str(runs), "--folder", str(tmp_path)]
    assert main(["--preset", "smoke", "--workers", "0", "2", *options, *more]) == 0
    run = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert run == json.loads(runs.read_text()) and run["bench"] == "data"
    assert [row["workers"] for row in run["rows"]] == [0, 2]
    assert all(row[name] > 0 for row in run["rows"] for name in ("tokens/s", "going on at 90 % s"))
    assert all(row["empty share of rows"] < 0.2 for row in run["rows"])
    assert len(run["memory"]) == 2 * POINTS and run["memory"][POINTS - 1]["read MiB"] == pytest.approx(0.6)
    assert run["sizes"]["documents"] > 50 and 0.5 < run["memory_growth"] < 2
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plot.png", "runs.jsonl"]


def test_rows_that_differ_between_numbers_of_workers_are_never_shown(monkeypatch):
    make = data_command.RowStream

    def by_workers(arguments, tokenizer, talk_length, seed, workers, window):
        return make(arguments, tokenizer, talk_length, workers, workers, window)

    monkeypatch.setattr(data_command, "RowStream", by_workers)
    with pytest.raises(WrongResultError, match="1 workers give other rows than 0"):
        main(["--preset", "smoke", "--workers", "0", "1", "--json"])


def test_a_stream_that_goes_on_elsewhere_is_never_shown(monkeypatch):
    real = data_command.RowStream.load_state_dict

    def a_row_late(self, state):
        real(self, state | {"offset": state["offset"] + 1})

    monkeypatch.setattr(data_command.RowStream, "load_state_dict", a_row_late)
    with pytest.raises(WrongResultError, match=r"goes on after .* gives another batch"):
        main(["--preset", "smoke", "--workers", "0", "--json"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "huge"}, "preset = huge: must be one of 1gb, small, smoke"),
        ({"kind": "csv"}, "kind = csv: must be one of parquet, jsonl, json.gz"),
        ({"workers": []}, r"workers = \[\]: must be numbers of at least 0"),
        ({"workers": [0, -1]}, r"workers = \[0, -1\]: must be numbers"),
        ({"batch_size": 0}, "batch_size = 0: must be at least 1"),
        ({"plot": "/nowhere/x.png"}, "plot = /nowhere/x.png: its folder does not exist"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DataBenchArguments(**options)


def test_spans_that_there_are_not_are_refused_before_anything_is_written(monkeypatch):
    monkeypatch.setattr(data_command, "write_stream", lambda *_: pytest.fail("it was written"))
    with pytest.raises(ValueError, match="spans = 'some': must be one of all, random"):
        main(["--preset", "smoke", "--spans", "some", "--json"])


def test_without_pyarrow_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ValueError, match=r"^kind = parquet: needs the package pyarrow; pip install 'qstar\[data\]'$"
    ):
        main(["--preset", "smoke"])
