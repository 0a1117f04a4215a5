"""The Trainer: who learns how fast, what is logged, when it stops, and that it goes on where it stopped."""

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_models import thinking_model, tokens
from torch import nn
from trainer_options import SHORT_RUN
from transformers import Trainer, TrainerCallback, TrainingArguments

from qstar import QuietStarForCausalLM, checkpoint
from qstar.data import collate
from qstar.reporting.profiling import TraceSteps
from qstar.training import NonFiniteError, QuietStarTrainer, last_complete_checkpoint
from qstar.training.trainer import _StopBeforeNonFinite

ROWS = [{"input_ids": tokens(1, 10, i)[0].tolist(), "position_ids": list(range(10))} for i in range(8)]


def arguments(folder, **changes):
    return TrainingArguments(str(folder), **(SHORT_RUN | changes))


def trainer(folder, model=None, kind=QuietStarTrainer, rates=None, callbacks=None, **changes):
    return kind(
        model=model or thinking_model(),
        args=arguments(folder, **changes),
        train_dataset=ROWS,
        eval_dataset=ROWS[:4],
        data_collator=collate,
        callbacks=callbacks,
        **(rates or {}),
    )


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_every_part_has_its_own_learning_rate_and_nothing_of_the_base_is_caught_by_its_name(tmp_path):
    model = thinking_model()
    for name in ("mixing", "boundary"):  # a base model may have parts of these names
        model.base.model.layers[0].add_module(name, nn.Linear(2, 2))
    rates = {"mixing_learning_rate": 3e-3, "boundary_learning_rate": 5e-4}
    optimizer = trainer(tmp_path, model, rates=rates, weight_decay=0.1).create_optimizer()
    found = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert id(p) not in found
            found[id(p)] = (group["lr"], group["weight_decay"])
    expected = {"mixing": 3e-3, "boundary": 5e-4, "base": 1e-3}
    for name, p in model.named_parameters():
        decays = p.ndim > 1 and not name.startswith("boundary")
        assert found[id(p)] == (expected[name.split(".")[0]], 0.1 if decays else 0.0), name


def test_without_rates_of_their_own_all_parts_have_the_learning_rate(tmp_path):
    optimizer = trainer(tmp_path).create_optimizer()
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}


def test_a_part_whose_rate_is_zero_does_not_move_and_the_others_do(tmp_path):
    model = thinking_model()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    trainer(tmp_path, model, rates={"mixing_learning_rate": 0.0}).train()
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name]) == name.startswith("mixing."), name


METRICS = {
    "loss", "grad_norm", "learning_rate", "base_nll", "mixed_nll", "mixed_nll_1", "mixed_nll_2",
    "reward_mean", "reward_std", "mix_weight_mean", "mix_weight_std", "policy_loss",
    "positive_advantages", "thoughts_per_second",
}  # fmt: skip


def test_every_metric_is_logged_as_the_mean_since_the_last_log(tmp_path):
    each, pairs = trainer(tmp_path), trainer(tmp_path, logging_steps=2, gradient_accumulation_steps=1)
    for one in (each, pairs):
        torch.manual_seed(3)
        one.train()
    history = [[log for log in t.state.log_history if "loss" in log] for t in (each, pairs)]
    assert [len(h) for h in history] == [4, 2]
    for log in history[0]:
        assert log.keys() >= METRICS and all(math.isfinite(log[name]) for name in METRICS)
    for name in METRICS - {"grad_norm", "learning_rate", "thoughts_per_second"}:
        mean = (history[0][0][name] + history[0][1][name]) / 2
        assert history[1][0][name] == pytest.approx(mean, rel=1e-4, abs=1e-6), name


def test_both_gradient_norms_are_logged_at_every_so_many_steps_and_change_no_update(tmp_path):
    models = thinking_model(), thinking_model()
    plain, logged = (trainer(tmp_path, m, rates={"gradient_norm_steps": n}) for m, n in zip(models, (0, 2)))
    for one in (plain, logged):
        torch.manual_seed(3)
        one.train()
    norms = [log for log in logged.state.log_history if "gradient_norm_nll" in log]
    assert [log["step"] for log in norms] == [0, 2]
    assert all(log["gradient_norm_nll"] > 0 and log["gradient_norm_policy"] > 0 for log in norms)
    assert not [log for log in plain.state.log_history if "gradient_norm_nll" in log]
    assert_same(models[0].state_dict(), models[1].state_dict())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_goes_on_bit_for_bit(tmp_path, accumulate):
    changes = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": accumulate,
    }
    whole = trainer(tmp_path / "whole", **changes)
    whole.train()
    resumed = trainer(tmp_path / "resumed", thinking_model(seed=5), **changes)  # its weights must not matter
    torch.rand(7)  # nor where the random numbers are
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert_same(resumed.model.state_dict(), whole.model.state_dict())
    moments = [t.optimizer.state_dict()["state"] for t in (whole, resumed)]
    assert all(torch.equal(moments[0][i]["exp_avg"], moments[1][i]["exp_avg"]) for i in moments[0])


class AtStep(TrainerCallback):
    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.action(model)


def test_a_traced_run_that_stops_early_writes_what_there_is_and_leaves_no_profiler_on(tmp_path):
    path = tmp_path / "trace.json"
    with pytest.raises(NonFiniteError), TraceSteps(str(path)) as tracer:
        trainer(tmp_path, callbacks=[tracer, AtStep(2, infinite_policy)], max_steps=6).train()
    names = [event.get("name") for event in json.loads(path.read_text())["traceEvents"]]
    assert names.count("qstar.blocks") >= 1
    assert not torch.autograd._profiler_enabled()


def infinite_policy(model):
    model.quiet_star = replace(model.quiet_star, policy_weight=math.inf)


def nan_gradient(model):
    model.mixing.layers[0].weight.register_hook(lambda grad: grad * math.nan)


@pytest.mark.parametrize(
    "happens, message",
    [(infinite_policy, "loss = (inf|nan) at step 4"), (nan_gradient, "a gradient is not finite at step 4")],
    ids=["loss", "gradient"],
)
def test_what_is_not_finite_stops_the_run_names_the_step_and_spares_the_parameters(
    tmp_path, happens, message
):
    model = thinking_model()
    run = trainer(
        tmp_path, model, callbacks=[AtStep(3, happens)], max_steps=9, save_strategy="steps", save_steps=2
    )
    with pytest.raises(NonFiniteError, match=message):
        run.train()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    good = last_complete_checkpoint(tmp_path)
    assert good == str(tmp_path / "checkpoint-2")
    QuietStarForCausalLM.from_pretrained(good)


def test_with_a_gradient_scaler_infinite_gradients_are_its_own_affair():
    model = nn.Linear(1, 1)
    model.weight.grad = torch.full((1, 1), math.inf)
    state = SimpleNamespace(global_step=0)
    _StopBeforeNonFinite().on_pre_optimizer_step(SimpleNamespace(fp16=True), state, None, model=model)
    with pytest.raises(NonFiniteError):
        _StopBeforeNonFinite().on_pre_optimizer_step(SimpleNamespace(fp16=False), state, None, model=model)


@pytest.fixture(scope="module")
def three_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer(folder, max_steps=3, save_strategy="steps", save_steps=1).train()
    return folder


@pytest.mark.parametrize(
    "name", ["model.safetensors", checkpoint.TENSORS, checkpoint.DESCRIPTION, "trainer_state.json"]
)
@pytest.mark.parametrize("left", [None, 0, 0.5], ids=["missing", "empty", "half"])
def test_a_checkpoint_that_was_cut_short_is_passed_over(three_checkpoints, tmp_path, name, left):
    run = shutil.copytree(three_checkpoints, tmp_path / "run")
    assert last_complete_checkpoint(run) == str(run / "checkpoint-3")
    path = run / "checkpoint-3" / name
    content = path.read_bytes()
    path.unlink()
    if left is not None:
        path.write_bytes(content[: int(left * len(content))])
    assert last_complete_checkpoint(run) == str(run / "checkpoint-2")


def test_label_smoothing_which_would_leave_the_models_loss_out_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^label_smoothing_factor = 0\.1: must be 0"):
        trainer(tmp_path, label_smoothing_factor=0.1)


def test_without_a_complete_checkpoint_there_is_none(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "missing") is None


def test_save_total_limit_keeps_the_newest_loadable(tmp_path):
    run = trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=1)
    run.train()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    loaded = QuietStarForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    assert_same(loaded.state_dict(), run.model.state_dict())


def test_the_best_model_is_loaded_at_the_end_if_asked_for(tmp_path):
    run = trainer(
        tmp_path,
        thinking_model(base_weight=1.0, policy_weight=0.0),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the first is the best, not the last
    )
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    best, last = (
        QuietStarForCausalLM.from_pretrained(tmp_path / f"checkpoint-{n}").state_dict() for n in (1, 4)
    )
    assert_same(run.model.state_dict(), best)
    assert not torch.equal(best["boundary.start_raw"], last["boundary.start_raw"]) or not torch.equal(
        best["base.lm_head.weight"], last["base.lm_head.weight"]
    )


@pytest.mark.parametrize("kind", [Trainer, QuietStarTrainer], ids=["stock", "ours"])
def test_evaluate_gives_the_models_own_loss_and_counts_in_no_training_metric(tmp_path, kind):
    model = thinking_model(thought_temperature=0.0, num_thoughts=1)
    run = trainer(tmp_path, model, kind=kind)
    expected = [float(model(**collate(ROWS[i : i + 2])).loss.detach()) for i in (0, 2)]
    assert run.evaluate()["eval_loss"] == pytest.approx(sum(expected) / 2, rel=1e-5)
    assert kind is Trainer or run.thoughts.collect() == {}


def test_the_stock_trainer_trains_every_parameter_and_saves_what_we_load(tmp_path):
    model = thinking_model()
    before = {name: x.clone() for name, x in model.named_parameters()}
    run = trainer(tmp_path, model, kind=Trainer, save_strategy="steps", save_steps=2)
    run.train()
    assert not [name for name, x in model.named_parameters() if torch.equal(x, before[name])]
    loaded = QuietStarForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert_same(loaded.state_dict(), model.state_dict())


def test_distributed_data_parallel_finds_every_parameter_used_in_every_step(tmp_path):
    """Also at w = 0, where the thoughts' gradient is exactly zero, and without any positive advantage."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        for model in (thinking_model(mix=0.0), thinking_model(), thinking_model(thought_length=0)):
            wrapped = nn.parallel.DistributedDataParallel(model.train())
            for step in range(3):  # the second forward raises if the first left a parameter unused
                output = wrapped(tokens(2, 9, step), generator=torch.Generator().manual_seed(step))
                output.loss.backward()
            assert all(p.grad is not None for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()
