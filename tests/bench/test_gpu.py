"""`make gpu`'s command, rehearsed on a CPU: every stage runs, and what fails is told."""

from __future__ import annotations

import json

import pytest
import torch
from qstar_bench import gpu
from qstar_bench.attention import AttentionArguments
from qstar_bench.gpu import Stage, counts, main, stages
from qstar_bench.step import StepArguments

from qstar.cli.options import parse_options


def test_a_rehearsal_runs_every_stage_and_writes_one_file_and_its_tables(tmp_path, capsys):
    output = tmp_path / "results" / "gpu.json"
    assert main(["--rehearse", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    written, last = json.loads(output.read_text()), json.loads(printed.splitlines()[-1])
    assert written == last
    assert [stage["stage"] for stage in written["stages"]] == ["tests", "attention T 9", "step"]
    assert all(stage["failed"] is None for stage in written["stages"])
    assert written["tests"]["failed"] == 0
    assert written["tests"]["skipped"] + written["tests"]["passed"] > 100
    assert written["machine"]["torch"] == torch.__version__
    for figure in ("matmul TFLOP/s", "fwd_bwd_vs_causal", "peak GiB", "skipped"):
        assert figure in printed


def test_a_stage_that_fails_or_runs_out_of_time_is_reported_and_the_others_run(tmp_path, monkeypatch, capsys):
    broken = [
        Stage("broken", ["qstar.cli.main", "bench", "nothing"], 60),
        Stage("slow", ["timeit", "-n", "1", "-r", "1", "import time; time.sleep(30)"], 1),
        Stage("step", ["json.tool", "--help"], 60),
    ]
    monkeypatch.setattr(gpu, "stages", lambda rehearse, junit: broken)
    monkeypatch.setattr(gpu, "summary", lambda found: [])
    assert main(["--rehearse", "--output", str(tmp_path / "gpu.json")]) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert "bench nothing: must be one of" in found["stages"][0]["failed"]
    assert found["stages"][1]["failed"] == "not done in 1 s"
    assert found["stages"][2]["failed"] is None
    assert "slow failed: not done in 1 s" in capsys.readouterr().out


def test_on_a_gpu_the_stages_take_at_most_ten_minutes_and_their_options_are_understood(tmp_path):
    chosen = stages(rehearse=False, junit=tmp_path / "x.xml")
    assert sum(stage.seconds for stage in chosen) <= 600
    for stage in chosen:
        if "attention" in stage.command:
            args = stage.command[stage.command.index("attention") + 1 :]
            (parsed,) = parse_options(AttentionArguments, args, prog="")
            assert parsed.device == "cuda"
        elif "step" in stage.command:
            args = stage.command[stage.command.index("step") + 1 :]
            (parsed,) = parse_options(StepArguments, args, prog="")
            assert parsed.autocast == "bfloat16"


def test_the_counts_come_from_the_report_of_the_tests(tmp_path):
    report = tmp_path / "tests.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="a" name="one"/>'
        '<testcase classname="a" name="two"><failure message="no"/></testcase>'
        '<testcase classname="a" name="three"><skipped/></testcase></testsuite></testsuites>'
    )
    assert counts(report) == {"passed": 1, "failed": 1, "skipped": 1, "names": ["a::two"]}
    assert counts(tmp_path / "none.xml")["passed"] == 0


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="device = cuda: torch sees no GPU"):
        main([])
