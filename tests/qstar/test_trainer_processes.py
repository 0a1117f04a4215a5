"""The Trainer in several processes, by DDP and sharded by FSDP2, and resumed with other numbers of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trainer_run import SAVED, STEPS

from qstar import QuietStarForCausalLM
from qstar.training import last_complete_checkpoint

pytestmark = pytest.mark.slow  # several processes

pytestmark = pytest.mark.slow  # several processes

SUPPORT = Path(__file__).parents[1] / "support"
# (processes, folder, whose Trainer, way, resumes)
RUNS: dict[str, tuple] = {
    "stock, 2": (2, "stock", "stock", "ddp", False),
    "stock, 1": (1, "stock-alone", "stock", "ddp", False),
    "stock, 2 then 1": (1, "stock", "stock", "ddp", True),
    "stock, 2 then 4": (4, "stock", "stock", "ddp", True),
    "own, unequal rows, 2": (2, "own", "own", "ddp", False),
    "own, unequal rows, 1": (1, "own-alone", "own", "ddp", False),
    "own, sharded, 2": (2, "sharded", "own", "SHARDED_STATE_DICT", False),
    "own, sharded, 2 then 4": (4, "sharded", "own", "SHARDED_STATE_DICT", True),
    "stock, sharded, saved whole, 2": (2, "whole", "stock", "FULL_STATE_DICT", False),
    "stock, sharded, saved whole, 2 then 1": (1, "whole", "stock", "FULL_STATE_DICT", True),
}


def train(folder: Path) -> dict[str, dict]:
    """Run them all, one after the other, from one Python; return what each printed."""
    runs = []
    for processes, name, whose, way, resumes in RUNS.values():
        checkpoint = [str(folder / name / f"checkpoint-{SAVED}")] if resumes else []
        runs.append([processes, [str(folder / name), whose, way, *checkpoint]])
    root = SUPPORT.parents[1]
    paths = [str(root), str(root / "kernels"), str(root / "bench"), str(SUPPORT)]
    ran = subprocess.run(
        [sys.executable, SUPPORT / "worlds.py", SUPPORT / "trainer_run.py", json.dumps(runs)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    printed = [json.loads(text.splitlines()[-1]) for text in json.loads(ran.stdout.splitlines()[-1])]
    return dict(zip(RUNS, printed))


def check_saved(folder: Path) -> None:
    """A sharded run saves a whole model, or shards of which none may be missing."""
    saved = QuietStarForCausalLM.from_pretrained(folder / "whole" / f"checkpoint-{STEPS}").state_dict()
    alone = QuietStarForCausalLM.from_pretrained(folder / "stock-alone" / f"checkpoint-{STEPS}").state_dict()
    for name, expected in alone.items():
        torch.testing.assert_close(saved[name], expected, rtol=1e-4, atol=1e-5)
    last = folder / "sharded" / f"checkpoint-{STEPS}"
    assert last_complete_checkpoint(folder / "sharded") == str(last)
    (last / "pytorch_model_fsdp_0" / ".metadata").rename(last / "metadata")  # a crash came before it
    assert last_complete_checkpoint(folder / "sharded") == str(folder / "sharded" / f"checkpoint-{SAVED}")


def test_losses_and_metrics_do_not_depend_on_the_number_of_processes_nor_on_an_interruption(tmp_path):
    found = train(tmp_path)
    for name, (_, _, _, way, _) in RUNS.items():
        run, alone = found[name], found["stock, 1" if name.startswith("stock") else "own, unequal rows, 1"]
        assert run["fsdp"] == (way != "ddp"), name
        for metric in ("loss", "base_nll") if name.startswith("stock") else ("loss",):
            assert len(run[metric]) == STEPS, (name, metric)
            assert run[metric] == pytest.approx(alone[metric], rel=1e-5), (name, metric)
    check_saved(tmp_path)
