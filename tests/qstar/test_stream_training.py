"""Training on a stream: interrupted and gone on with, bit for bit, and the tokens of a step."""

import json
import shutil
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from shards import made_up, write_shard, write_shards
from tiny_models import base_model
from tiny_tokenizer import saved_base_model, tiny_tokenizer
from trainer_options import SHORT_RUN
from transformers import Trainer, TrainingArguments

from qstar import QuietStarConfig, QuietStarForCausalLM
from qstar.cli.main import main
from qstar.data import DataArguments, RowStream, collate
from qstar.training.callbacks import STATE, QuietStarCallback

TEXTS = made_up(80)
SPAN = 24


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved_base_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "shards", TEXTS, count=8)


def log_of(folder):
    """What a run logged at each step, without times."""
    history = json.loads((folder / STATE).read_text())["log_history"]
    return [{k: v for k, v in entry.items() if k != "thoughts_per_second"} for entry in history]


OPTIONS = {
    "span_length": SPAN,
    "held_out_rows": 2,
    "thought_length": 2,
    "talk_length": 2,
    "policy_weight": 1.0,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 2,
    "streaming": True,
}


def train(capsys, base, shards, **given):
    options = [x for name, value in (OPTIONS | given).items() for x in (f"--{name}", str(value))]
    code = main(["train", "--model", str(base), "--text", *shards, *options])
    return code, *capsys.readouterr()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "given"),
    [
        (2, {"dataloader_num_workers": 2, "tokens_per_step": 4 * SPAN}),
        (4, {"spans": "random", "per_device_train_batch_size": 3}),
    ],
    ids=["two micro-batches, workers", "random spans"],
)
def test_a_run_on_a_stream_that_was_cut_ends_as_the_whole_one_bit_for_bit(
    capsys, base, shards, tmp_path, step, given
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = given | {"max_steps": 6, "save_steps": 2}
    code, _, err = train(capsys, base, shards, **options, output_dir=whole)
    assert code == 0, err
    shutil.copytree(whole / f"checkpoint-{step}", cut / f"checkpoint-{step}")
    code, _, err = train(capsys, base, shards, **options, output_dir=cut, resume_from_checkpoint="true")
    assert code == 0, err
    assert log_of(cut / "checkpoint-6") == log_of(whole / "checkpoint-6")
    models = (QuietStarForCausalLM.from_pretrained(folder).state_dict() for folder in (whole, cut))
    assert all(torch.equal(*pair) for pair in zip(*(model.values() for model in models)))


def trainer(folder, shards, **changes):
    """A stock Trainer on a stream, and the rows that its model is given."""
    arguments = DataArguments(text=shards, span_length=SPAN, held_out_rows=2, streaming=True)
    config = QuietStarConfig(thought_length=2, talk_length=2, policy_weight=1.0)
    model = QuietStarForCausalLM.from_base(base_model("llama", vocab_size=len(tiny_tokenizer())), config)
    given = []
    model.register_forward_pre_hook(
        lambda _, __, batch: given.extend(batch["input_ids"].tolist()), with_kwargs=True
    )
    run = Trainer(
        model=model,
        args=TrainingArguments(
            str(folder), **(SHORT_RUN | {"save_strategy": "steps", "save_steps": 2} | changes)
        ),
        train_dataset=RowStream(arguments, tiny_tokenizer(), 2, window=200),
        data_collator=partial(collate, length=SPAN),
    )
    run.add_callback(QuietStarCallback(run))
    return run, given


def padded(rows):
    return [row["input_ids"] + [0] * (SPAN - len(row["input_ids"])) for row in rows]


def test_the_stock_trainer_goes_on_without_reading_what_was_before(tmp_path):
    shards = write_shards(tmp_path / "shards", made_up(32, longest=10), count=8)
    run, given = trainer(tmp_path, shards, per_device_train_batch_size=5, max_steps=5, save_steps=4)
    run.train()
    assert given == padded(islice(run.train_dataset, 25))
    epoch, shard, _ = run.train_dataset.state_dict(20)["position"]
    assert (epoch, shard >= 3) == (0, True)
    for number in np.random.default_rng([0, 0]).permutation(8)[: shard - 1]:
        if number:  # the first has the held-out rows, which are read again
            write_shard(Path(shards[number]), [{"text": "something else altogether"}])
    resumed, rest = trainer(tmp_path, shards, per_device_train_batch_size=5, max_steps=5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert rest == given[20:]


def test_with_another_batch_the_rows_go_on_where_they_were(shards, tmp_path):
    run, given = trainer(tmp_path, shards, per_device_train_batch_size=4)
    run.train()
    resumed, rest = trainer(
        tmp_path, shards, per_device_train_batch_size=1, max_steps=6, gradient_accumulation_steps=2
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(rest) == 8 and rest == given[8:]
    third, last = trainer(tmp_path, shards, per_device_train_batch_size=3, max_steps=6)
    third.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert len(last) == 6 and last[:4] == rest[4:]


def test_a_checkpoint_without_a_position_is_refused(shards, tmp_path):
    trainer(tmp_path, shards)[0].train()
    state = json.loads((tmp_path / "checkpoint-2" / STATE).read_text())
    del state["stateful_callbacks"]["RowStream"]
    (tmp_path / "checkpoint-2" / STATE).write_text(json.dumps(state))
    resumed, _ = trainer(tmp_path, shards)
    with pytest.raises(ValueError, match="has no position of a RowStream"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_budget_of_tokens_is_kept_by_accumulation(capsys, base, shards, tmp_path):
    given = {"max_steps": 2, "save_steps": 2, "tokens_per_step": 6 * SPAN}
    code, _, err = train(capsys, base, shards, **given, output_dir=tmp_path / "out")
    assert code == 0, err
    state = json.loads((tmp_path / "out" / "checkpoint-2" / STATE).read_text())
    arguments = torch.load(tmp_path / "out" / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert arguments.gradient_accumulation_steps == 3
    stream = RowStream(
        DataArguments(text=shards, span_length=SPAN, held_out_rows=2, streaming=True),
        tiny_tokenizer(),
        2,
        seed=42,
    )
    list(islice(stream, 12))
    assert state["stateful_callbacks"]["RowStream"] == stream.state_dict()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"tokens_per_step": 100},
            "tokens_per_step = 100: must be a multiple of 48, the tokens of 2 rows of ",
        ),
        ({"tokens_per_step": 0}, "tokens_per_step = 0: must be a multiple of 48"),
        (
            {"tokens_per_step": 96, "gradient_accumulation_steps": 2},
            "tokens_per_step = 96: give it or gradient_accumulation_steps = 2, not both",
        ),
        ({"dataloader_num_workers": -1}, "workers = -1: must be at least 0"),
    ],
)
def test_a_mistake_in_the_options_of_a_stream_is_told_in_one_line(
    capsys, base, shards, tmp_path, given, message
):
    code, _, err = train(capsys, base, shards, **given, output_dir=tmp_path)
    assert code == 1 and "Traceback" not in err
    assert err.splitlines()[-1].startswith(f"qstar train: {message}")
