"""The commands of docs/scaling.md: torchrun and accelerate launch with two processes on the CPU, interrupted,
and resumed by one process and by four."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
CONFIGS = ROOT / "examples" / "accelerate"
STEPS = 6  # the examples' own
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file"]


def environment() -> dict[str, str]:
    paths = [str(ROOT / room) for room in ("", "kernels", "bench", "tests/support")]
    ours = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return os.environ | ours | {"ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1"}


def losses(printed: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in re.findall(r"^step (\d+): loss (\S+)", printed, re.M)}


def on_cpu(config: str, folder: Path, **changes) -> str:
    """A copy of a config that we ship, for processes on the CPU."""
    given = yaml.safe_load((CONFIGS / config).read_text())
    path = folder / config
    path.write_text(yaml.safe_dump(given | {"use_cpu": True, "mixed_precision": "no"} | changes))
    return str(path)


def launched(*arguments: str, fails: bool = False) -> dict[int, float]:
    """The losses of `python ARGUMENTS`."""
    ran = subprocess.run([sys.executable, *arguments], env=environment(), capture_output=True, text=True)
    assert (ran.returncode != 0) == fails, ran.stderr
    return losses(ran.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["torchrun_ddp", "torchrun_fsdp2", "accelerate_loop"])
def test_a_run_of_two_processes_is_interrupted_and_goes_on_with_one_and_with_four(tmp_path, way):
    program = str(ROOT / "examples" / f"{way}.py")
    launch = TORCHRUN
    if way == "accelerate_loop":
        launch = [*LAUNCH, on_cpu("ddp.yaml", tmp_path, num_processes=2)]
    killed = str(SUPPORT / "killed_in_step_4.py")
    before = launched(*launch, killed, program, str(tmp_path / "run"), fails=True)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    runs = [[2, [str(tmp_path / "whole")]], [1, [str(tmp_path / "run")]], [4, [str(tmp_path / "other")]]]
    ran = subprocess.run(
        [sys.executable, SUPPORT / "worlds.py", program, json.dumps(runs)],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    whole, *resumed = map(losses, json.loads(ran.stdout.splitlines()[-1]))
    assert list(whole) == list(range(1, STEPS + 1)) and list(before) == [1, 2, 3]
    # not 1e-5 as elsewhere: what has no gradient yet but rounding errors, Adam moves by whole steps
    assert before == pytest.approx({step: whole[step] for step in before}, rel=1e-4)
    for after in resumed:
        assert list(after) == [3, 4, 5, 6]
        assert after == pytest.approx({step: whole[step] for step in after}, rel=1e-4)


@pytest.mark.slow
def test_accelerates_own_fsdp2_shards_and_resumes_with_four_processes(tmp_path):
    """It runs on GPUs alone, so it is told that there are some."""
    program = [str(SUPPORT / "as_if_on_gpus.py"), str(ROOT / "examples" / "accelerate_loop.py")]
    found = []
    for processes in (2, 4):
        config = on_cpu("fsdp2.yaml", tmp_path, num_processes=processes)
        found.append(launched(*LAUNCH, config, *program, str(tmp_path / "run")))
        assert (tmp_path / "run" / "step-6" / "pytorch_model_fsdp_0" / ".metadata").is_file()
        for step in (4, 6):
            if processes == 2:
                shutil.rmtree(tmp_path / "run" / f"step-{step}")
    whole, resumed = found
    assert list(whole) == list(range(1, STEPS + 1)) and list(resumed) == [3, 4, 5, 6]
    assert resumed == pytest.approx({step: whole[step] for step in resumed}, rel=1e-4)


@pytest.mark.slow
def test_qstar_train_reports_once_from_two_processes(tmp_path):
    (tmp_path / "book.txt").write_text("A whale swims far away in the deep blue sea. " * 200)
    options = {
        "text": tmp_path / "book.txt",
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "span_length": 32,
        "thought_length": 2,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "report_to": "none",
    }
    given = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    ran = subprocess.run(
        [sys.executable, *TORCHRUN, "-m", "qstar.cli.main", "train", *given],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("peak resident memory") == ran.stdout.count("curves: ") == 1
    assert json.loads(ran.stdout.splitlines()[-1])["steps"] == 2
    assert "held out, after" in ran.stderr and (tmp_path / "out" / "curves.png").is_file()


@pytest.mark.parametrize(
    ("name", "kind", "section"),
    [
        ("ddp", "MULTI_GPU", None),
        ("fsdp2", "FSDP", "fsdp_config"),
        ("zero3", "DEEPSPEED", "deepspeed_config"),
    ],
)
def test_accelerate_reads_the_configs_and_knows_each_of_their_options(name, kind, section):
    path = CONFIGS / f"{name}.yaml"
    read = load_config_from_file(str(path))  # raises for a name at the top that it does not know
    assert (read.distributed_type, read.num_processes, read.mixed_precision) == (kind, 8, "bf16")
    options = {action.dest for action in launch_command_parser()._actions}
    assert set(yaml.safe_load(path.read_text()).get(section, ())) <= options
    if name == "zero3":
        assert read.deepspeed_config["zero_stage"] == 3
        assert "NOT RUN" in path.read_text()
    if name == "fsdp2":
        assert read.fsdp_config["fsdp_version"] == 2
