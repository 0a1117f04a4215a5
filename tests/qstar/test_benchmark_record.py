"""A run's document goes to stdout and, if asked, to a file that later runs add to."""

import csv
import json
from dataclasses import dataclass

import pytest

from qstar.reporting.benchmark_record import OutputArguments, finish, machine
from qstar.reporting.profiling import traced


@dataclass
class Arguments:
    size: int = 3


def run(output, rows):
    return finish("test", Arguments(), machine("cpu"), rows, output, speedup=2.0)


def test_runs_are_lines_of_a_jsonl_file_and_the_last_line_of_stdout(tmp_path, capsys):
    output = OutputArguments(append=str(tmp_path / "runs.jsonl"))
    run(output, [{"a": 1}])
    run(output, [{"b": "ü"}])
    lines = (tmp_path / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines == capsys.readouterr().out.splitlines()
    first, second = map(json.loads, lines)
    assert (first["bench"], first["arguments"], first["speedup"]) == ("test", {"size": 3}, 2.0)
    assert first["machine"]["torch"] and first["machine"]["device"].startswith("cpu")
    assert second["rows"] == [{"b": "ü"}]


def test_tables_are_added_to_a_csv_file_of_the_same_columns_only(tmp_path):
    output = OutputArguments(append=str(tmp_path / "table.csv"))
    run(output, [{"a": 1, "b": 2}, {"a": 3}])
    run(output, [{"a": 5, "b": 6}])
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["a"], row["b"]) for row in rows] == [("1", "2"), ("3", ""), ("5", "6")]
    with pytest.raises(ValueError, match=r"append = .*its columns are"):
        run(output, [{"c": 1}])
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"append": "runs.txt"}, r"append = runs.txt: must end with .jsonl or .csv"),
        ({"append": "/nowhere/runs.jsonl"}, "append = .*: its folder does not exist"),
        ({"trace": "/nowhere/trace.json"}, "trace = .*: its folder does not exist"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(option, reason):
    with pytest.raises(ValueError, match=reason):
        OutputArguments(**option)


def test_a_trace_without_a_folder_is_refused():
    with (
        pytest.raises(ValueError, match=r"trace = /nowhere/x\.json: its folder does not exist"),
        traced("/nowhere/x.json"),
    ):
        pass
