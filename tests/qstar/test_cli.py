"""Every command on tiny files, and every mistake in one line."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import COMMON
from tiny_tokenizer import PROSE, saved_base_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qstar import QuietStarForCausalLM
from qstar.cli.main import COMMANDS, main

SIZES = {"span_length": 24, "held_out_rows": 2, "thought_length": 2, "talk_length": 2, "num_thoughts": 2}
RUN = {"max_steps": 2, "per_device_train_batch_size": 2, "policy_weight": 1.0, "learning_rate": 1e-3}


def flags(**values):
    return [x for name, value in values.items() for x in (f"--{name}", str(value))]


def call(capsys, *argv):
    """(exit code, stdout, stderr) of a command that runs in this process."""
    capsys.readouterr()
    code = main([str(x) for x in argv])
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved_base_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(PROSE * 5, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(base, text, tmp_path_factory):
    """The folder of a run of four steps that saved at every second one."""
    folder = tmp_path_factory.mktemp("trained")
    options = SIZES | RUN | {"max_steps": 4, "save_steps": 2, "output_dir": folder}
    assert main(["train", "--model", str(base), "--text", str(text), *flags(**options)]) == 0
    return folder


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]], ids=str)
def test_help_names_every_command(capsys, argv):
    code, out, _ = call(capsys, *argv)
    assert code == 0
    assert all(f"\n  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("command", [["train"], ["generate"], ["bench", "step"]], ids=" ".join)
def test_help_of_a_command_names_its_options(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert "--thought_length" in capsys.readouterr().out


def test_train_from_yaml_writes_checkpoint_curves_and_figures(capsys, base, text, tmp_path):
    config = tmp_path / "run.yaml"
    values = SIZES | RUN | {"max_steps": 9, "text": [str(text)], "resume_from_checkpoint": None}
    config.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items()))
    folder = tmp_path / "out"
    argv = ["train", "--config", config, "--model", base, "--output_dir", folder, "--max_steps", 2]
    code, out, err = call(capsys, *argv)
    assert code == 0 and "Traceback" not in err
    figures = json.loads(out.splitlines()[-1])
    assert figures["steps"] == 2  # the command line wins over the file
    assert figures["before"].keys() == figures["after"].keys() >= {"base_nll", "mixed_nll", "mixed_nll_hard"}
    assert figures["before"]["mix_weight"] == 0 != figures["after"]["mix_weight"]
    assert figures["before"]["base_nll"] == pytest.approx(figures["before"]["mixed_nll"], rel=1e-5)
    assert all(math.isfinite(x) for side in ("before", "after") for x in figures[side].values())
    assert "| held out" in out and f"{figures['after']['mixed_nll']:.4f}" in out
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    model = QuietStarForCausalLM.from_pretrained(folder)
    assert model.quiet_star.thought_length == 2
    assert model.quiet_star.suppressed_tokens == [AutoTokenizer.from_pretrained(folder).eos_token_id]
    AutoModelForCausalLM.from_pretrained(folder)


def test_train_writes_a_trace_of_its_second_to_fourth_step(capsys, base, text, tmp_path):
    options = SIZES | RUN | {"max_steps": 5, "save_strategy": "no", "trace": tmp_path / "trace.json"}
    argv = ["train", "--model", base, "--text", text, "--output_dir", tmp_path / "out"]
    code, out, _ = call(capsys, *argv, *flags(**options))
    assert (code, json.loads(out.splitlines()[-1])["steps"]) == (0, 5)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
    assert [x for x in names if x.startswith("ProfilerStep")] == [f"ProfilerStep#{i}" for i in (1, 2, 3)]
    assert all(names.count(name) == 3 for name in ("qstar.prefix", "qstar.rollout", "qstar.blocks"))
    assert names.count("qstar.loss") >= 3
    code, _, err = call(capsys, *argv, *flags(**(options | {"max_steps": 1})))
    assert code == 1 and "trace.json: needs a run of at least 2 steps" in err.splitlines()[-1]
    code, _, err = call(capsys, *argv, *flags(**(options | {"trace": "/nowhere/trace.json"})))
    said = "qstar train: trace = /nowhere/trace.json: its folder does not exist"
    assert (code, err.splitlines()[-1]) == (1, said)


def test_config_may_be_joined_by_an_equals_sign(capsys, base, text, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("thought_length: -3\n")
    code, _, err = call(capsys, "train", f"--config={config}", "--model", base, "--text", text)
    assert (code, err.splitlines()[-1]) == (1, "qstar train: thought_length = -3: must be at least 0")


def test_training_goes_on_from_a_checkpoint_that_already_thinks(capsys, trained, text, tmp_path):
    options = SIZES | RUN | {"max_steps": 1, "thought_length": 3, "output_dir": tmp_path}
    code, out, _ = call(capsys, "train", "--model", trained, "--text", text, *flags(**options))
    assert code == 0
    assert json.loads(out.splitlines()[-1])["before"]["mix_weight"] != 0
    assert QuietStarForCausalLM.from_pretrained(tmp_path).quiet_star.thought_length == 3


def test_resuming_a_run_that_was_cut_gives_the_same_model_bit_for_bit(capsys, base, text, trained, tmp_path):
    for step in (2, 4):
        shutil.copytree(trained / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()  # killed while it was saved
    options = SIZES | RUN | {"max_steps": 4, "save_steps": 2, "output_dir": tmp_path}
    options["resume_from_checkpoint"] = "true"
    code, _, _ = call(capsys, "train", "--model", base, "--text", text, *flags(**options))
    assert code == 0
    whole, resumed = (QuietStarForCausalLM.from_pretrained(f).state_dict() for f in (trained, tmp_path))
    assert all(torch.equal(x, resumed[name]) for name, x in whole.items())


def test_a_tokenizer_without_an_em_dash_is_told_what_is_used_instead(text, tmp_path, caplog, capsys):
    model = saved_base_model(tmp_path / "base", em_dash=False)
    assert len(tiny_tokenizer(em_dash=False).encode("—")) == 3
    options = SIZES | RUN | {"max_steps": 1, "output_dir": tmp_path / "out"}
    code, _, _ = call(capsys, "train", "--model", model, "--text", text, *flags(**options))
    assert code == 0
    for name in ("start_token", "end_token"):
        assert f"{name} = '—' is no single token of this model: using -" in caplog.text


def test_generate_prints_the_same_text_for_a_prompt_alone_and_in_a_batch(capsys, trained):
    prompts = ["the state", "we meet today to speak of the work that"]
    options = flags(max_new_tokens=5)
    alone = [call(capsys, "generate", "--model", trained, "--prompt", p, *options)[1] for p in prompts]
    code, both, _ = call(capsys, "generate", "--model", trained, "--prompt", *prompts, *options)
    assert code == 0 and both == "".join(alone)
    assert all(out.startswith(p) for out, p in zip(alone, prompts))
    assert any(len(out) > len(p) + 1 for out, p in zip(alone, prompts))  # a greedy row may end at once


def test_generate_json_holds_texts_and_a_thought_for_every_token(capsys, trained):
    argv = ["--prompt", "the state", "we meet", *flags(max_new_tokens=5, temperature=0.8, seed=3)]
    code, out, _ = call(capsys, "generate", "--model", trained, *argv, "--json", "--show_thoughts")
    assert code == 0
    answers = json.loads(out.splitlines()[-1])["answers"]
    assert [a["prompt"] for a in answers] == ["the state", "we meet"]
    assert all(len(a["thoughts"]) == 5 for a in answers)
    _, plain, _ = call(capsys, "generate", "--model", trained, *argv, "--json")
    assert [a["text"] for a in json.loads(plain)["answers"]] == [a["text"] for a in answers]
    assert all("thoughts" not in a for a in json.loads(plain)["answers"])


def test_generate_shows_thoughts_in_brackets_and_none_of_length_zero(capsys, trained):
    argv = ["generate", "--model", trained, "--prompt", "the state", *flags(max_new_tokens=3)]
    _, shown, _ = call(capsys, *argv, "--show_thoughts")
    assert shown.count("[") == 3
    code, out, _ = call(capsys, *argv, "--thought_length", 0)
    assert code == 0 and "[" not in out


def _saved(folder, kind, **sizes):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


SMALL = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2}


def test_a_frozen_base_comes_out_of_training_as_it_went_in(capsys, base, text, tmp_path):
    options = flags(**SIZES | RUN | {"output_dir": tmp_path})
    code, _, err = call(capsys, "train", "--model", base, "--text", text, "--freeze_base", *options)
    assert code == 0, err
    model, begun = QuietStarForCausalLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(base)
    for name, x in begun.state_dict().items():
        assert torch.equal(x, model.base.state_dict()[name]), name
    assert model.mixing.layers[-1].weight.abs().sum() > 0


def test_with_lora_rank_adapters_are_trained_and_saved_and_the_base_stays(capsys, base, text, tmp_path):
    options = flags(**SIZES | RUN | {"output_dir": tmp_path, "lora_rank": 4})
    code, _, err = call(capsys, "train", "--model", base, "--text", text, *options)
    assert code == 0, err
    assert (tmp_path / "adapter_model.safetensors").is_file() and not (
        tmp_path / "model.safetensors"
    ).exists()
    model, begun = QuietStarForCausalLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(base)
    state = model.base.state_dict()
    for name, x in begun.state_dict().items():
        layer, _, kind = name.rpartition(".")
        assert torch.equal(x, state.get(name, state.get(f"{layer}.base_layer.{kind}"))), name
    moved = [name for name, x in state.items() if "lora_B" in name and x.abs().sum() > 0]
    assert len(moved) == 2 * 7 and all(x.shape[0] == 4 for name, x in state.items() if "lora_A" in name)
    assert model.mixing.layers[-1].weight.abs().sum() > 0
    message = train_fails(capsys, "--model", tmp_path, "--text", text, *options)
    assert message == "lora_rank = 4: the base model is frozen or has adapters already"


def test_without_peft_lora_rank_names_the_extra(capsys, base, text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    options = flags(**SIZES | RUN | {"output_dir": tmp_path, "lora_rank": 4})
    message = train_fails(capsys, "--model", base, "--text", text, *options)
    assert message == "lora_rank = 4: needs the package peft; pip install 'qstar[peft]'"


def test_the_knobs_of_thoughts_are_options_and_the_last_layers_alone_move(capsys, base, text, tmp_path):
    knobs = {"start_token": " the", "end_token": "-", "talk_weight": 1.0, "base_weight": 0.0}
    knobs |= {"advantage": "normalized", "writer": "base", "policy_weight": 0.0, "trainable_layers": 1}
    options = flags(**SIZES | RUN | knobs | {"output_dir": tmp_path, "boundary_scale": 1.0})
    code, _, err = call(capsys, "train", "--model", base, "--text", text, *options)
    assert code == 0, err
    model, begun = QuietStarForCausalLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(base)
    written = {name: getattr(model.quiet_star, name) for name in knobs if name != "trainable_layers"}
    assert written == {name: value for name, value in knobs.items() if name != "trainable_layers"}
    begun = begun.state_dict()
    moved = {n for n, x in model.base.state_dict().items() if not torch.equal(x, begun[n])}
    assert moved and all(".layers.1." in n or n == "model.norm.weight" for n in moved)
    writer = dict(model.writer.base.named_parameters())
    assert all(torch.equal(writer[n], begun[n]) for n in writer)


UNSUPPORTED = {
    "bloom": {"vocab_size": 300, "hidden_size": 32, "n_layer": 1, "n_head": 4},
    "falcon": SMALL | {"num_attention_heads": 4},
    "mamba": SMALL,
    "lfm2": COMMON | {"vocab_size": 300, "layer_types": ["conv", "full_attention"]},
}


def train_fails(capsys, *argv):
    code, out, err = call(capsys, "train", *argv)
    assert code == 1 and "Traceback" not in out + err
    lines = [line for line in err.splitlines() if line.startswith("qstar train: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("qstar train: ")


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_a_model_without_the_interface_is_refused_by_its_type(capsys, kind, text, tmp_path):
    model = _saved(tmp_path / "base", kind, **UNSUPPORTED[kind])
    message = train_fails(capsys, "--model", model, "--text", text, *flags(**SIZES, output_dir=tmp_path))
    assert message.startswith(f"model_type = '{kind}': ")


REFUSED = {
    "no options": ([], "text = [], dataset = None: give exactly one of them"),
    "unknown option": (["--n_ahead", 12], "unknown options ['--n_ahead', '12']; see qstar train --help"),
    "no number": (["--thought_length", "many"], "invalid int value: 'many'"),
    "negative thought": (["--thought_length", -1], "thought_length = -1: must be at least 0"),
    "talk of nothing": (["--talk_length", 0], "talk_length = 0: must be at least 1"),
    "beyond the context": (
        ["--span_length", 93],
        "a row of span_length has 93 tokens: with 5 slots for a thought and its talk tokens, 97 positions "
        "exceed the model's context of 96",
    ),
    "no rank": (["--lora_rank", 0], "lora_rank = 0: must be at least 1"),
    "nothing to adapt": (
        ["--lora_rank", 4, "--trainable_layers", 1],
        "lora_rank = 4: the base model is frozen",
    ),
    "no config": (["--config"], "--config: needs a YAML file"),
    "missing config": (["--config", "no.yaml"], "No such file or directory: 'no.yaml'"),
    "nothing to resume": (
        ["--resume_from_checkpoint", "true"],
        "resume_from_checkpoint: no complete checkpoint",
    ),
    "not a number": (["--policy_weight", "inf"], "at step 1; last good checkpoint: none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_in_the_options_is_told_in_one_line(capsys, case, base, text, tmp_path):
    wrong, message = REFUSED[case]
    rest = ["--model", base, "--text", text, *flags(**SIZES | {"max_steps": 1, "output_dir": tmp_path})]
    assert message in train_fails(capsys, *(rest if case != "no options" else []), *wrong)


def test_a_logger_that_is_not_installed_is_told_in_one_line_with_its_extra(capsys, monkeypatch, base, text):
    monkeypatch.setattr("qstar.cli.train.get_available_reporting_integrations", lambda: ["wandb"])
    rest = ["--model", base, "--text", text, "--report_to"]
    allowed = "must be none, all or among the installed loggers, ['wandb']"
    extra = "; pip install 'qstar[tensorboard]'"
    assert (
        train_fails(capsys, *rest, "tensorboard", "wandb") == f"report_to = ['tensorboard']: {allowed}{extra}"
    )
    assert train_fails(capsys, *rest, "mlflow") == f"report_to = ['mlflow']: {allowed}"


@pytest.mark.parametrize(
    "content, message",
    [
        ("thought_lengths: 3\n", "unknown options ['--thought_lengths=3']"),
        ("- thought_length\n", "must hold 'option: value' lines"),
        ("thought_length: [", "is no YAML"),
    ],
    ids=["unknown key", "a list", "no yaml"],
)
def test_a_mistake_in_the_yaml_is_told_in_one_line(capsys, content, message, base, text, tmp_path):
    (tmp_path / "run.yaml").write_text(content)
    argv = ["--config", tmp_path / "run.yaml", "--model", base, "--text", text, "--output_dir", tmp_path]
    assert message in train_fails(capsys, *argv)


@pytest.mark.parametrize(
    "content, message",
    [("", "the file is empty"), ("a", "has 1 tokens"), ("a b", "talk_length = 4 needs more")],
    ids=["empty", "one token", "short"],
)
def test_a_text_that_is_none_is_told_in_one_line(capsys, content, message, base, tmp_path):
    (tmp_path / "a.txt").write_text(content)
    sizes = SIZES | {"talk_length": 4, "output_dir": tmp_path}
    assert message in train_fails(capsys, "--model", base, "--text", tmp_path / "a.txt", *flags(**sizes))


def test_a_tokenizer_with_more_tokens_than_the_model_is_told_in_one_line(capsys, text, tmp_path):
    model = saved_base_model(tmp_path / "base", vocab_size=200)
    message = train_fails(capsys, "--model", model, "--text", text, *flags(**SIZES, output_dir=tmp_path))
    assert message.startswith("input_ids = ") and message.endswith("must be in [0, 200)")


def test_a_folder_that_is_missing_is_told_in_one_line(capsys, text, tmp_path):
    assert str(tmp_path / "no") in train_fails(capsys, "--model", tmp_path / "no", "--text", text)
    code, _, err = call(capsys, "generate", "--model", tmp_path / "no", "--prompt", "x")
    assert code == 1 and err == f"qstar generate: path = '{tmp_path / 'no'}': no such folder\n"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--prompt", ""], "prompt = '': must not be empty"),
        (["--prompt", "the state", "--max_new_tokens", 0], "max_new_tokens = 0: must be at least 1"),
        (["--prompt", "the state", "--max_new_tokens", 95], "exceed the model's context of 96"),
        (["--prompt", "the state", "--temperature", -1], "temperature = -1.0: must be at least 0"),
        (["--prompt", "the state", "--top_p", 0], "top_p = 0.0: must be in (0, 1]"),
        (["--prompt", "the state", "--thought_length", -1], "thought_length = -1: must be at least 0"),
    ],
    ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else "",
)
def test_a_mistake_in_generates_options_is_told_in_one_line(capsys, trained, argv, message):
    code, out, err = call(capsys, "generate", "--model", trained, *argv)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("qstar generate: ") and message in err


@pytest.mark.parametrize("argv", [["trian"], ["bench"], ["bench", "stop"]], ids=" ".join)
def test_an_unknown_command_is_told_which_there_are(capsys, argv):
    code, out, err = call(capsys, *argv)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert ("train" if argv == ["trian"] else "step") in err


@pytest.mark.slow
def test_the_process_itself_exits_with_1_and_one_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "qstar.cli.main",
        "train",
        "--model",
        str(tmp_path / "no"),
        "--text",
        "a",
    ]
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(str(root / p) for p in ("", "kernels", "bench"))
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("qstar train: ") and done.stderr.count("\n") == 1
