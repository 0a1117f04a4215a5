"""Every trainer's example runs as documented, and an interrupted run goes on bit for bit where it was."""

import importlib.util
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
from interrupted_runs import SAVE_EVERY, STEPS
from torch import distributed
from torch.nn.modules.module import register_module_forward_hook

from qstar import QuietStarForCausalLM

ROOT = Path(__file__).parents[2]
EXAMPLES = {
    "pytorch_loop": None,
    "accelerate_loop": None,
    "hf_trainer": "tensorboard",
    "trl_sft": "trl",
    "lightning_module": "lightning",
    "torchrun_ddp": None,
    "torchrun_fsdp2": None,
}
# those whose interrupted runs share one Python: starting it with their imports costs more than the runs
TOGETHER = {
    "plain loops": ["pytorch_loop", "torchrun_ddp", "torchrun_fsdp2", "accelerate_loop"],
    "trainers of others": ["hf_trainer", "trl_sft", "lightning_module"],
}


def needs(package: str | None) -> None:
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"pip install 'qstar[{package}]'")


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_trains_and_run_again_goes_on_where_it_stopped(tmp_path, monkeypatch, name):
    needs(EXAMPLES[name])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    losses = []

    def on_forward(module, inputs, output):
        if isinstance(module, QuietStarForCausalLM) and module.training:
            losses.append(output.loss.item())

    hook = register_module_forward_hook(on_forward)
    try:
        for steps in (2, 3):
            runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"](str(tmp_path), steps, save_every=2)
    finally:
        hook.remove()
        if distributed.is_initialized():  # where the example failed before its last line
            distributed.destroy_process_group()
    assert len(losses) == 3 and all(map(math.isfinite, losses))


@pytest.mark.slow
@pytest.mark.parametrize("names", TOGETHER.values(), ids=TOGETHER.keys())
def test_an_interrupted_run_has_the_losses_of_an_uninterrupted_one_bit_for_bit(tmp_path, names):
    for name in names:
        needs(EXAMPLES[name])
    paths = [str(ROOT / room) for room in ("", "kernels", "bench")]
    examples = [f"examples/{name}.py" for name in names]
    ran = subprocess.run(
        [sys.executable, ROOT / "tests" / "support" / "interrupted_runs.py", tmp_path, *examples],
        cwd=ROOT,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert list(found) == examples
    for name, ((_, whole, _), *interrupted) in found.items():
        assert len(whole) == STEPS == len(set(whole)), name
        assert [run.split("-")[0] for run, _, _ in interrupted] == ["terminated", "killed", "killed"], name
        for run, before, after in interrupted:
            assert before == whole[: len(before)] and after == whole[-len(after) :], (name, run)
            # the run that was terminated in step 5 had two saves; those killed within the second had one
            steps, saves = (5, 2) if run == "terminated" else (4, 1)
            assert (len(before), len(after)) == (steps, STEPS - saves * SAVE_EVERY), (name, run)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_under_60_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60


def test_without_its_one_override_the_sft_trainer_stops_instead_of_training_a_plain_model(
    tmp_path, monkeypatch
):
    needs("trl")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    example = runpy.run_path(str(ROOT / "examples" / "trl_sft.py"))
    main = example["main"]
    monkeypatch.setitem(main.__globals__, "ThinkingSFTTrainer", example["SFTTrainer"])
    with pytest.raises(AttributeError, match="last_hidden_state"):
        main(str(tmp_path), steps=1)
