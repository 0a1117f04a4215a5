"""`qstar bench kernels` runs, tells what it compiled even when interrupted, and ends with its document."""

import json

import pytest
from qstar_bench.kernels import kernel_table
from qstar_bench.kernels.compile_gate import Gate
from qstar_bench.kernels.kernel_table import costs, summary

from qstar.cli.main import main

ROW = {
    "kernel": "thought_rows", "chip": "sm_90", "dtype": "bfloat16", "D": 64, "G": 4, "options": "plain",
    "tensor-core instructions": 8, "registers": 100, "stack": 0, "shared KiB": 10.0,
    "programs a processor": 4, "GFLOP": 1.0, "MB": 2.0, "model us": 3.0, "compile s": 1.0,
}  # fmt: skip


def test_the_command_prints_a_table_and_ends_with_its_document(capsys, tmp_path):
    runs = tmp_path / "runs.jsonl"
    slice_of_it = ["--kernel", "delta", "--chip", "sm_80", "--width", "64"]
    assert main(["bench", "kernels", *slice_of_it, "--append", str(runs)]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    document = json.loads(lines[-1])
    assert [row["kernel"] for row in document["rows"]] == ["thought_delta"]
    assert (document["complaints"], document["points"], document["points_wanted"]) == ([], 1, 1)
    assert document["machine"]["chips"] == ["sm_80"] and document["machine"]["triton"]
    assert "Every kernel passes the gate." in lines
    assert "delta-sm_80-bfloat16-D64-G4-plain" in err  # the point, beside the bar
    assert runs.read_text().splitlines() == lines[-1:]


def test_interrupted_it_tells_and_keeps_what_was_compiled(capsys, monkeypatch, tmp_path):
    def compiled(wanted, jobs):
        yield wanted[1], [ROW], []
        raise KeyboardInterrupt

    monkeypatch.setattr(kernel_table, "compiled", compiled)
    assert main(["bench", "kernels", "--whole", "--append", str(tmp_path / "runs.jsonl")]) == 130
    out, err = capsys.readouterr()
    document = json.loads((tmp_path / "runs.jsonl").read_text())
    assert (document["rows"], document["points"]) == ([ROW], 1)
    assert "interrupted: 1 of " in err and "| thought_rows" in out


def test_a_kernel_that_must_not_ship_is_told_and_fails_the_command(capsys, monkeypatch):
    complaint = "rows-sm_90: 8 bytes of stack: registers are spilled"
    monkeypatch.setattr(kernel_table, "compiled", lambda wanted, jobs: [(wanted[0], [ROW], [complaint])])
    assert main(["bench", "kernels", "--kernel", "rows", "--chip", "sm_90", "--width", "64"]) == 1
    out, _ = capsys.readouterr()
    assert complaint in out.splitlines() and "passes the gate" not in out


def test_a_row_of_the_summary_is_the_worst_of_its_points():
    worse = ROW | {"options": "all", "registers": 255, "stack": 8, "programs a processor": 1, "GFLOP": 9.0}
    (row,) = summary([ROW, worse | {"tensor-core instructions": 2, "shared KiB": 99.0}])
    assert (row["points"], row["registers"], row["stack"], row["shared KiB"]) == (2, 255, 8, 99.0)
    assert (row["tensor-core instructions"], row["programs a processor"], row["GFLOP"]) == (2, 1, 1.0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--chip sm_70", "chip = sm_70: must be one of sm_80"),
        ("--kernel softmax", "kernel = softmax: must be one of forward"),
        ("--width 65", "width = 65: must be one of 64"),
        ("--group 3", "group = [3]: must be of 1 and 4"),
        ("--jobs 0", "jobs = 0: must be at least 1"),
        ("--trace trace.json", "unknown options ['--trace', 'trace.json']"),  # nothing runs on a device
    ],
    ids=lambda x: x if x.startswith("--") else "",
)
def test_what_cannot_be_compiled_is_told_in_one_line(capsys, argv, message):
    assert main(["bench", "kernels", *argv.split()]) == 1
    assert capsys.readouterr().err.startswith(f"qstar bench: {message}")


def test_only_visible_scores_are_counted():
    flops, _ = costs(Gate("forward", "sm_90", D=64, G=1))
    assert flops == 2 * 2 * 64 * 8 * 1024 * 14 * (1024 / 2 + 15 / 2)
