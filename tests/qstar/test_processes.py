"""Several processes are as one with all their rows: loss, gradients, thoughts, what they save."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from shared_batch import CASES, HYBRID_CASES, MESSAGES, SHARDED_CASES, WHOLE_CASES

pytestmark = pytest.mark.slow  # several processes

SUPPORT = Path(__file__).parents[1] / "support"


def run(*runs: tuple[int, list[str]]) -> list[dict]:
    """Run shared_batch.py in (processes, arguments) each and return what rank 0 printed."""
    root = SUPPORT.parents[1]
    paths = [str(root), str(root / "kernels"), str(root / "bench"), str(SUPPORT)]
    ran = subprocess.run(
        [sys.executable, SUPPORT / "worlds.py", SUPPORT / "shared_batch.py", json.dumps(runs)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return [json.loads(printed) for printed in json.loads(ran.stdout.splitlines()[-1])]


ALL = [f"ddp, {name}" for name in CASES | WHOLE_CASES] + [f"fsdp2, {name}" for name in CASES | SHARDED_CASES]
WITHOUT_POLICY = ("no policy", "only the base loss", "at the start, w = 0", "no thought", "frozen writer")


# The cases of a test share one Python: starting it costs more than they do.


def test_the_parts_of_a_batch_have_the_loss_and_gradients_of_the_whole():
    """With the whole model in every process, with shards, and with shards that are kept in copies."""
    gradients, hybrid = run((2, ["gradients"]), (4, ["hybrid"]))
    assert sorted(gradients) == sorted(ALL)
    assert sorted(hybrid) == [f"fsdp2, {name}" for name in HYBRID_CASES]
    for case, (loss_error, gradient_error, positive) in (gradients | hybrid).items():
        assert loss_error < 1e-5 and gradient_error < 1e-5, case
        # else the policy term was not looked at
        assert positive > 0 or case.split(", ", 1)[1] in WITHOUT_POLICY, case


def test_a_layer_travels_as_often_as_the_plan_says():
    """docs/scaling.md: it does not depend on R; a step may begin with one gather more of one layer."""
    (found,) = run((2, ["messages"]))
    assert found.keys() == MESSAGES.keys()
    for case, messages in found.items():
        k, kept = MESSAGES[case]["thought_length"], not MESSAGES[case]["sharding"]["reshard_after_forward"]
        least, most = (2, 3) if kept else (k + 4, k + 5)
        assert least <= messages["gather"] < most, case
        assert messages["reduce"] == 1, case


def test_ranks_think_different_thoughts_from_one_seed_and_together_those_of_one_process():
    random = json.dumps({"thinking_positions": "random", "thinking_fraction": 0.5})
    found = run((2, ["thoughts", "{}"]), (3, ["thoughts", random]))
    for processes, ((whole, drawn_next), *ranks) in zip((2, 3), (who.values() for who in found)):
        own = [thoughts[0] for thoughts, _ in ranks]
        assert len(own) == processes == len({str(x) for x in own})
        assert own == whole
        assert all(drawn == drawn_next for _, drawn in ranks)  # so one state is enough to resume from


def test_a_sharded_model_mixes_in_fp32_is_saved_by_its_whole_state_and_has_no_frozen_writer(tmp_path):
    (found,) = run((2, ["half", str(tmp_path)]))
    assert 0 < found["error"] < 0.02
    assert found["dtypes"] == ["torch.float32"]  # though it computes in bf16
    assert found["warned"] == []  # of its gathered copies, which are in bf16
    assert found["saved"]
    assert found["refused"]["save"].startswith("state_dict = None: must be given")
    assert found["refused"]["writer"].startswith("writer = 'base': must be 'self' under FSDP2")
