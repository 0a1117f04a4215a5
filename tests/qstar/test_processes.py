"""Several processes are as one with all their rows: loss, gradients, thoughts, what they save."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shared_batch import CASES, HYBRID_CASES, MESSAGES, SHARDED_CASES, WHOLE_CASES
from tiny_models import thinking_model, tokens

from qstar.data import collate
from qstar.distributed_random import rand

pytestmark = pytest.mark.slow  # several processes

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What rank 0 of two processes (of the last run, three) says of each question."""
    folder = tmp_path_factory.mktemp("sharded")
    random = json.dumps({"thinking_positions": "random", "thinking_fraction": 0.5})
    runs = {
        "gradients": [2, ["gradients"]],
        "hybrid": [4, ["hybrid"]],
        "messages": [2, ["messages"]],
        "saved": [2, ["half", str(folder)]],
        "thoughts": [2, ["thoughts", "{}"]],
        "thoughts at random positions": [3, ["thoughts", random]],
    }
    root = SUPPORT.parents[1]
    paths = [str(root), str(root / "kernels"), str(root / "bench"), str(SUPPORT)]
    ran = subprocess.run(
        [sys.executable, SUPPORT / "worlds.py", SUPPORT / "shared_batch.py", json.dumps(list(runs.values()))],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return dict(zip(runs, map(json.loads, json.loads(ran.stdout.splitlines()[-1]))))


ALL = [f"ddp, {name}" for name in CASES | WHOLE_CASES] + [f"fsdp2, {name}" for name in CASES | SHARDED_CASES]
WITHOUT_POLICY = ("no policy", "only the base loss", "at the start, w = 0", "no thought", "frozen writer")


@pytest.mark.parametrize("case", ALL)
def test_the_parts_of_a_batch_have_the_loss_and_gradients_of_the_whole(found, case):
    loss_error, gradient_error, positive = found["gradients"][case]
    assert loss_error < 1e-5 and gradient_error < 1e-5
    assert positive > 0 or case.split(", ", 1)[1] in WITHOUT_POLICY  # else the policy term was not looked at


@pytest.mark.parametrize("case", HYBRID_CASES)
def test_so_have_shards_that_are_kept_in_copies(found, case):
    loss_error, gradient_error, positive = found["hybrid"][f"fsdp2, {case}"]
    assert loss_error < 1e-5 and gradient_error < 1e-5 and positive > 0


@pytest.mark.parametrize("case", MESSAGES)
def test_a_layer_travels_as_often_as_the_plan_says(found, case):
    """docs/scaling.md: it does not depend on R; a step may begin with one gather more of one layer."""
    k, kept = MESSAGES[case]["thought_length"], not MESSAGES[case]["sharding"]["reshard_after_forward"]
    least, most = (2, 3) if kept else (k + 4, k + 5)
    assert least <= found["messages"][case]["gather"] < most
    assert found["messages"][case]["reduce"] == 1


def test_no_case_is_forgotten(found):
    assert sorted(found["gradients"]) == sorted(ALL)


@pytest.mark.parametrize("run", ["thoughts", "thoughts at random positions"])
def test_ranks_think_different_thoughts_from_one_seed_and_together_those_of_one_process(found, run):
    (whole, drawn_next), *ranks = found[run].values()
    own = [thoughts[0] for thoughts, _ in ranks]
    assert len(own) == {"thoughts": 2, "thoughts at random positions": 3}[run] == len({str(x) for x in own})
    assert own == whole
    assert all(drawn == drawn_next for _, drawn in ranks)  # so one state is enough to resume from


def test_one_process_draws_what_torch_does():
    numbers = rand(3, 2, 5, torch.Generator().manual_seed(1), torch.device("cpu"), torch.float64)
    assert torch.equal(
        numbers, torch.rand(3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    )


def test_a_sharded_model_in_bf16_mixes_in_fp32_and_does_not_warn_of_its_gathered_copies(found):
    assert 0 < found["saved"]["error"] < 0.02
    assert found["saved"]["dtypes"] == ["torch.float32"]
    assert found["saved"]["warned"] == []


def test_a_sharded_model_is_saved_by_its_whole_state_and_refuses_without_it(found):
    assert found["saved"]["saved"]
    assert found["saved"]["refused"]["save"].startswith("state_dict = None: must be given")


def test_a_frozen_writer_which_shares_weights_cannot_be_sharded(found):
    assert found["saved"]["refused"]["writer"].startswith("writer = 'base': must be 'self' under FSDP2")


def test_counts_of_another_model_are_refused():
    model, items = thinking_model(), thinking_model(talk_length=3).count_items(tokens(2, 10))
    with pytest.raises(
        ValueError, match=r"^num_items_in_batch has shape \(5,\): must be one number, .* \(4,\)"
    ):
        model(tokens(2, 10), num_items_in_batch=items)


def test_what_is_counted_are_targets_those_of_each_talk_step_and_rewarded_positions():
    rows = [{"input_ids": [5] * n, "position_ids": list(range(n))} for n in (8, 3, 5)]
    masked = [row | {"think_mask": [0, 1] * 4} for row in rows[:1]]
    model = thinking_model(talk_length=2)
    assert model.count_items(**collate(rows)).tolist() == [7 + 2 + 4, 7 + 2 + 4, 6 + 1 + 3, 5 + 0 + 2]
    assert model.count_items(**collate(masked)).tolist() == [7, 3, 3, 2]
    whole = {name: x[:, :-1] for name, x in collate(rows).items()}
    assert model.count_items(whole["input_ids"]).tolist() == [18, 18, 15, 12]
