"""`make gpu`'s command, rehearsed on a CPU: every stage runs, and what fails is told."""

import json
import time
from pathlib import Path

import pytest
import torch
from qstar_bench import gpu_command
from qstar_bench.attention.attention_request import AttentionArguments
from qstar_bench.generation_command import GenerationBenchArguments
from qstar_bench.gpu_command import Stage, counts, stages
from qstar_bench.training_step.step_ways import StepBenchArguments

from qstar.cli.main import main
from qstar.cli.options import parse_options
from qstar.reporting.benchmark_record import OutputArguments

ARGUMENTS = {
    "attention": AttentionArguments,
    "generate": GenerationBenchArguments,
    "step": StepBenchArguments,
}


@pytest.mark.slow
def test_a_rehearsal_runs_every_stage_and_writes_one_file_and_its_tables(tmp_path, capsys):
    output = tmp_path / "results" / "gpu.json"
    assert main(["bench", "gpu", "--rehearse", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    written, last = json.loads(output.read_text()), json.loads(printed.splitlines()[-1])
    assert written == last
    assert [row["stage"] for row in written["rows"]] == ["tests", "attention T 9", "step", "generate"]
    assert all(stage["failed"] is None for stage in written["stages"])
    benches = [stage["result"]["bench"] for stage in written["stages"][1:]]
    assert benches == ["attention", "step", "generate"]
    assert written["tests"]["failed"] == 0 and written["passed"]
    assert written["tests"]["skipped"] + written["tests"]["passed"] > 100
    assert written["machine"]["torch"] == torch.__version__
    for figure in ("fwd_bwd_vs_causal", "memory MiB", "peak GiB", "speedup_vs_sequential", "skipped"):
        assert figure in printed


def test_a_stage_that_fails_or_runs_out_of_time_is_reported_and_the_others_run(tmp_path, monkeypatch, capsys):
    broken = [
        Stage("broken", ["json.tool", "no-such-file"], 60),
        Stage("slow", ["timeit", "-n", "1", "-r", "1", "import time; time.sleep(30)"], 1),
        Stage("step", ["json.tool", "--help"], 60),
    ]
    monkeypatch.setattr(gpu_command, "stages", lambda rehearse, folder: broken)
    assert main(["bench", "gpu", "--rehearse", "--output", str(tmp_path / "gpu.json")]) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert "no-such-file" in found["stages"][0]["failed"]
    assert found["stages"][1]["failed"] == "not done in 1 s"
    assert found["stages"][2]["failed"] is None
    assert not found["passed"]
    assert "slow failed: not done in 1 s" in capsys.readouterr().out


def test_a_stage_without_time_ends_with_all_that_it_started(tmp_path):
    """They would go on using the GPU beside the next stage."""
    alive = tmp_path / "alive"
    code = (
        f"import time, pathlib; [(time.sleep(0.1), pathlib.Path({str(alive)!r}).touch()) for _ in range(99)]"
    )
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    assert Stage("slow", ["timeit", "-n", "1", "-r", "1", start], 2).run()["failed"] == "not done in 2 s"
    assert alive.exists()
    alive.unlink()
    time.sleep(0.5)
    assert not alive.exists()


def test_every_gpu_test_is_in_the_folder_that_the_command_runs():
    marked = [
        p for p in (gpu_command.ROOT / "tests").rglob("*.py") if "pytest.mark.gpu" in p.read_text("utf-8")
    ]
    folder = gpu_command.ROOT / gpu_command.GPU_TESTS
    assert marked and [path for path in marked if not path.is_relative_to(folder)] == [Path(__file__)]


def test_a_last_line_that_is_cut_is_no_document():
    assert gpu_command._last_document('{"rows": [') is None
    assert gpu_command._last_document("") is None
    assert gpu_command._last_document('table\n{"rows": []}\n') == {"rows": []}


def test_on_a_gpu_the_stages_take_at_most_ten_minutes_and_their_options_are_understood(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    chosen = stages(rehearse=False, folder=tmp_path)
    assert sum(stage.seconds for stage in chosen) <= 600
    benches = set()
    for stage in chosen[1:]:
        module, bench, name, *argv = stage.command
        assert (module, bench) == ("qstar.cli.main", "bench")
        parsed, _ = parse_options((ARGUMENTS[name], OutputArguments), argv, prog="")
        assert parsed.device == "cuda"
        benches.add(name)
    assert benches == set(ARGUMENTS)


def test_the_counts_come_from_the_report_of_the_tests(tmp_path):
    report = tmp_path / "tests.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="a" name="one"/>'
        '<testcase classname="a" name="two"><failure message="no"/></testcase>'
        '<testcase classname="a" name="three"><skipped/></testcase></testsuite></testsuites>'
    )
    assert counts(report) == {"passed": 1, "failed": 1, "skipped": 1, "names": ["a::two"]}
    assert counts(tmp_path / "none.xml")["passed"] == 0


def test_without_a_gpu_it_says_so_in_one_line(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["bench", "gpu"]) == 1
    assert capsys.readouterr().err == "qstar bench: device = cuda: torch sees no GPU on this machine\n"


def test_without_the_tests_beside_it_it_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_command, "ROOT", tmp_path)
    assert main(["bench", "gpu", "--rehearse", "--output", str(tmp_path / "gpu.json")]) == 1
    said = "qstar bench: bench gpu: runs the tests, which only a clone of the project has\n"
    assert capsys.readouterr().err == said and not list(tmp_path.iterdir())
