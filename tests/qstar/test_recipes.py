"""The paper's recipes: their values, their commands, and their first two steps with a tiny stand-in model."""

import json
import math
import shlex
from pathlib import Path

import pytest
import torch
from shards import made_up, write_shard
from tiny_tokenizer import saved_base_model

from qstar import QuietStarConfig, QuietStarForCausalLM
from qstar.cli.eval_inputs import EvalArguments
from qstar.cli.main import main
from qstar.cli.options import parse_options
from qstar.cli.train import accumulation, parse

ROOT = Path(__file__).parents[2]
RECIPES = {name: ROOT / "recipes" / f"mistral-7b-{name}.yaml" for name in ("openwebmath", "c4")}
ON_CPU = ["--use_cpu", "true"]  # transformers refuses bf16 where it sees no GPU, unless told so
SOURCES = {"openwebmath": ("open-web-math/open-web-math", None), "c4": ("allenai/c4", "en")}


def commands(path):
    """The commands in the comments of a recipe."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [shlex.split(line.removeprefix("#   ")) for line in lines if line.startswith("#   ")]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_holds_exactly_the_papers_values(name):
    model, data, config, args = parse(["--config", str(RECIPES[name]), *ON_CPU])
    assert model.model == "mistralai/Mistral-7B-v0.1"
    assert (data.dataset, data.dataset_config, data.dataset_split) == (*SOURCES[name], "train")
    assert (data.streaming, data.spans, data.span_length, data.text_field) == (True, "random", 256, "text")
    knobs = (config.thought_length + 3, config.talk_length, config.num_thoughts)
    assert knobs == (12, 4, 2)  # n_ahead, n_ahead_talk, n_passes
    weights = (config.policy_weight, config.base_weight, config.boundary_scale)
    assert weights == (1e6, 0.5, 100)
    assert (config.reinforce_temperature, config.thought_temperature) == (3, 1)
    assert config == QuietStarConfig()  # so nothing else is set
    assert args.optim == "adamw_torch" and args.learning_rate == 1e-6 and args.weight_decay == 1e-3
    assert (args.warmup_steps, args.lr_scheduler_type, args.max_steps) == (20, "constant_with_warmup", 100)
    assert args.max_grad_norm == 1.0 and args.bf16
    assert model.mixing_learning_rate is model.boundary_learning_rate is model.lora_rank is None
    assert accumulation(args, data.span_length) * args.per_device_train_batch_size == 8


@pytest.mark.parametrize("name", RECIPES)
def test_the_commands_of_a_recipe_are_understood(monkeypatch, name):
    found = commands(RECIPES[name])
    training = [command[command.index("train") + 1 :] for command in found if "train" in command]
    assert found[0][:3] == ["accelerate", "launch", "--config_file"] and (ROOT / found[0][3]).is_file()
    monkeypatch.chdir(ROOT)
    every, adapters = (parse([*command, *ON_CPU]) for command in training)
    assert all(f"recipes/{RECIPES[name].name}" in command for command in training)
    assert every[0].lora_rank is None and adapters[0].lora_rank == 16
    assert adapters[3].gradient_checkpointing
    evaluation = [command[2:] for command in found if command[:2] == ["qstar", "eval"]]
    assert all(command[-2:] == ["--device", "cuda"] for command in evaluation)
    asked = [parse_options((EvalArguments,), command[:-2], "qstar eval")[0] for command in evaluation]
    assert [each.task for each in asked] == ["gsm8k", "commonsense_qa"]
    assert {(each.model, each.before) for each in asked} == {(every[3].output_dir, every[0].model)}
    assert [command[:2] for command in found[len(training) :]] == [["qstar", "eval"]] * 2


def open_web_math(folder):
    """Two shards with the columns of open-web-math/open-web-math."""
    for i in range(2):
        rows = [
            {"url": f"https://example.org/{j}", "text": text, "date": "2023-03-20 10:38:05", "metadata": "{}"}
            for j, text in enumerate(made_up(60, longest=400, seed=i))
        ]
        write_shard(folder / "data" / f"train-{i:05}-of-00002.parquet", rows)


def c4(folder):
    """Two shards with the fields of allenai/c4, under its configuration."""
    for i in range(2):
        rows = [
            {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": f"https://example.org/{j}"}
            for j, text in enumerate(made_up(60, longest=400, seed=i))
        ]
        write_shard(folder / "en" / f"c4-train.{i:05}-of-00002.json.gz", rows)
    data_files = "data_files:\n  - split: train\n    path: en/c4-train.*.json.gz\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: en\n  {data_files}---\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_first_two_steps_of_a_recipe_run_on_local_text_of_the_same_format(capsys, tmp_path, name):
    shape = {"max_position_embeddings": 512, "sliding_window": None, "num_hidden_layers": 1}
    base = saved_base_model(tmp_path / "base", "mistral", **shape)
    {"openwebmath": open_web_math, "c4": c4}[name](tmp_path / "text")
    changes = {"model": base, "dataset": tmp_path / "text", "output_dir": tmp_path / "out", "max_steps": 2}
    options = [x for option, value in changes.items() for x in (f"--{option}", str(value))]
    code = main(["train", "--config", str(RECIPES[name]), *options, *ON_CPU])
    out, err = capsys.readouterr()
    assert code == 0, err
    figures = json.loads(out.splitlines()[-1])
    assert figures["steps"] == 2 and math.isfinite(figures["after"]["mixed_nll"])
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    logged = [entry for entry in state["log_history"] if "loss" in entry]
    assert [entry["learning_rate"] for entry in logged] == pytest.approx([0, 1 / 20 * 1e-6])
    assert state["stateful_callbacks"]["RowStream"]["offset"] == 16  # two steps of 8 spans
    model = QuietStarForCausalLM.from_pretrained(tmp_path / "out")
    assert next(model.base.parameters()).dtype == torch.float32
    assert model.mixing.layers[-1].weight.abs().sum() > 0
