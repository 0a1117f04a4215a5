"""The stock Trainer with our callback: what it logs and to whom, and that it resumes with its thoughts."""

import gc
import math
import shutil
import weakref

import pytest
import torch
from tiny_models import base_model, thinking_model, tokens
from trainer_options import SHORT_RUN
from transformers import Trainer, TrainingArguments

from qstar import QuietStarForCausalLM
from qstar.data import collate
from qstar.training import QuietStarCallback, last_complete_checkpoint

ROWS = [{"input_ids": tokens(1, 10, i)[0].tolist(), "position_ids": list(range(10))} for i in range(8)]


def stock(folder, model=None, callback=True, resume_from=None, **changes):
    trainer = Trainer(
        model=model or thinking_model(),
        args=TrainingArguments(str(folder), **(SHORT_RUN | {"use_cpu": True} | changes)),
        train_dataset=ROWS,
        eval_dataset=ROWS[:4],
        data_collator=collate,
    )
    if callback:
        trainer.add_callback(QuietStarCallback(trainer, resume_from))
    return trainer


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


METRICS = {
    "base_nll", "mixed_nll", "mixed_nll_1", "mixed_nll_2", "reward_mean", "reward_std", "mix_weight_mean",
    "mix_weight_std", "mix_weight_positive", "talk_gain", "policy_loss", "positive_advantages",
    "thoughts_per_second",
}  # fmt: skip


def logged(trainer, name):
    return {log["step"]: log[name] for log in trainer.state.log_history if name in log}


def test_every_metric_is_logged_at_the_steps_of_the_loss_as_the_mean_over_micro_batches(tmp_path):
    each, pairs = (stock(tmp_path, logging_steps=n) for n in (1, 2))
    small = stock(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    for trainer in (each, pairs, small):
        torch.manual_seed(3)
        trainer.train()
    for name in METRICS:
        assert logged(each, name).keys() == logged(each, "loss").keys() == {1, 2, 3, 4}, name
        assert logged(pairs, name).keys() == {2, 4}
        assert all(math.isfinite(value) for value in logged(each, name).values())
    for name in METRICS - {"thoughts_per_second"}:
        one, two = logged(each, name), logged(pairs, name)
        assert two[2] == pytest.approx((one[1] + one[2]) / 2, rel=1e-4, abs=1e-6), name
    # the base NLL needs no thought, so the mean of two halves of a batch is that of the batch
    assert logged(small, "base_nll")[1] == pytest.approx(logged(each, "base_nll")[1], rel=1e-4)


def test_the_metrics_are_those_of_training_and_the_model_keeps_no_hook_afterwards(tmp_path):
    model = thinking_model()
    seen = []
    model.register_forward_hook(
        lambda module, _, out: seen.append(float(out.metrics["base_nll"])) if module.training else None
    )
    trainer = stock(tmp_path, model, eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert list(logged(trainer, "base_nll").values()) == pytest.approx(seen)
    assert len(model._forward_hooks) == 1
    trainer.evaluate()
    model.train()
    model(tokens(1, 8))
    assert trainer.callback_handler.callbacks[-1].collect() == {}


def test_tensorboard_is_told_every_metric_at_every_step(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="pip install 'qstar[tensorboard]'"
    )
    trainer = stock(tmp_path, report_to=["tensorboard"], max_steps=2)
    trainer.train()
    (events,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    read = accumulator.EventAccumulator(str(events)).Reload()
    for name in (*METRICS, "loss"):
        written = [(event.step, event.value) for event in read.Scalars(f"train/{name}")]
        assert written == [(step, pytest.approx(x)) for step, x in logged(trainer, name).items()], name
        assert [step for step, _ in written] == [1, 2]


def test_the_stock_trainer_resumes_bit_for_bit_from_its_last_complete_checkpoint(tmp_path):
    changes = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
    }
    whole = stock(tmp_path / "run", **changes)
    whole.train()
    run = shutil.copytree(tmp_path / "run", tmp_path / "copy")
    (run / "checkpoint-6" / "trainer_state.json").unlink()  # a crash came first
    resumed = stock(run, thinking_model(seed=5), **changes)  # its weights must not matter
    torch.rand(7)  # nor where the random numbers are
    resumed.train(resume_from_checkpoint=last_complete_checkpoint(run))
    assert_same(resumed.model.state_dict(), whole.model.state_dict())
    for name in (METRICS | {"loss", "grad_norm"}) - {"thoughts_per_second"}:
        assert logged(resumed, name) == logged(whole, name), name
    assert resumed.state.global_step == 6


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    stock(folder, max_steps=2, save_strategy="steps", save_steps=1).train()
    return folder


def test_a_run_elsewhere_resumes_from_the_folder_the_callback_is_told_and_from_no_other(
    checkpoints, tmp_path
):
    source = checkpoints / "checkpoint-1"
    trainer = stock(tmp_path, max_steps=2)
    with pytest.raises(ValueError, match=r"^resume_from = .*checkpoint-1': must be the checkpoint that"):
        trainer.train(resume_from_checkpoint=str(source))
    other = stock(tmp_path, resume_from=checkpoints / "checkpoint-2", max_steps=2)
    with pytest.raises(ValueError, match=r"^resume_from = .*checkpoint-2': must be the checkpoint that"):
        other.train(resume_from_checkpoint=str(source))
    right = stock(tmp_path, thinking_model(seed=5), resume_from=source, max_steps=2)
    right.train(resume_from_checkpoint=str(source))
    expected = QuietStarForCausalLM.from_pretrained(checkpoints / "checkpoint-2").state_dict()
    assert_same(right.model.state_dict(), expected)


def test_without_the_callback_a_run_that_resumes_stops_and_names_it(checkpoints, tmp_path):
    trainer = stock(tmp_path, callback=False, max_steps=2)
    with pytest.raises(ValueError, match=r"add_callback\(QuietStarCallback\(trainer\)\)"):
        trainer.train(resume_from_checkpoint=str(checkpoints / "checkpoint-1"))
    with pytest.raises(ValueError, match="thought parts"):
        trainer.model.save_pretrained(tmp_path / "mixed-up")
    assert not (tmp_path / "mixed-up").exists()


def test_the_best_model_is_whole_after_training(tmp_path):
    best = {"metric_for_best_model": "eval_loss", "greater_is_better": True, "load_best_model_at_end": True}
    trainer = stock(
        tmp_path,
        thinking_model(base_weight=1.0, policy_weight=0.0),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        **best,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    first = QuietStarForCausalLM.from_pretrained(tmp_path / "checkpoint-1").state_dict()
    assert_same(trainer.model.state_dict(), first)
    trainer.save_model(tmp_path / "saved")
    assert_same(QuietStarForCausalLM.from_pretrained(tmp_path / "saved").state_dict(), first)


def test_tensors_of_a_base_model_alone_go_to_the_base_and_whole_ones_make_it_whole():
    model, other = thinking_model(), thinking_model(seed=5)
    result = model.load_state_dict(other.base.state_dict(), strict=False)
    assert_same(model.base.state_dict(), other.base.state_dict())
    assert {name.split(".")[0] for name in result.missing_keys} == {"boundary", "mixing"}
    assert result.unexpected_keys == []
    with pytest.raises(ValueError, match="of a base model alone"):
        model(tokens(1, 8))
    model.load_state_dict(other.state_dict())
    model(tokens(1, 8))


@pytest.mark.parametrize("fails", [False, True], ids=["ended", "failed"])
def test_the_callback_keeps_neither_trainer_nor_model_alive(tmp_path, fails):
    model = thinking_model()
    trainer = stock(tmp_path, model, max_steps=1)
    if fails:
        model.mixing.layers[0].weight.register_hook(lambda gradient: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.train()
    else:
        trainer.train()
    kept = weakref.ref(trainer)
    gc.collect()
    gc.disable()
    try:
        del trainer
        assert kept() is None
    finally:
        gc.enable()


def test_another_model_is_refused(tmp_path):
    trainer = Trainer(model=base_model(), args=TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match=r"^trainer\.model = LlamaForCausalLM: must be a QuietStar"):
        QuietStarCallback(trainer)
