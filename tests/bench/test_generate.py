"""`qstar bench generate`: the published way writes the same tokens, and the document has its keys."""

import json

import pytest
import torch
from qstar_bench import generation_command
from qstar_bench.generation_command import recompute
from tiny_models import thinking_model, tokens, write
from tiny_tokenizer import saved_base_model
from transformers import AutoTokenizer

from qstar import QuietStarConfig, QuietStarForCausalLM
from qstar.cli.main import main

WAYS = ["plain", "adaptive", "speculative", "sequential", "recompute"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with thoughts that count."""
    path = tmp_path_factory.mktemp("generate")
    base = saved_base_model(path / "base", max_position_embeddings=256)
    model = QuietStarForCausalLM.from_base(str(base), QuietStarConfig(), dtype="float32")
    torch.manual_seed(0)
    torch.nn.init.normal_(model.mixing.layers[-1].weight, std=0.05)
    model.save_pretrained(path / "model")
    AutoTokenizer.from_pretrained(base).save_pretrained(path / "model")
    return str(path / "model")


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_recomputing_everything_for_each_token_writes_the_tokens_of_the_generator(kind):
    model = thinking_model(kind, mix=0.1)
    out = write(model, tokens(1, 9), max_new_tokens=6, thought_temperature=0.0).sequences
    assert [recompute(model, out[:, :n], 3) for n in range(9, 15)] == out[0, 9:].tolist()


def test_the_command_prints_a_card_and_a_table_and_ends_with_its_document(folder, tmp_path, capsys):
    files = ["--append", str(tmp_path / "runs.csv"), "--trace", str(tmp_path / "trace.json")]
    argv = ["--model", folder, "--prompt", "we meet", "--new_tokens", "8", "--rounds", "1", *files]
    assert main(["bench", "generate", *argv]) == 0
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    for key in ("speedup_vs_sequential", "speedup_vs_recompute", "adaptive_vs_plain", "steps_per_token"):
        assert document[key] > 0
    assert 0 <= document["acceptance_rate"] <= 1
    assert [row["way"] for row in document["rows"]] == WAYS
    assert all(row["tokens/s"] > 0 and row["memory MiB"] > 0 for row in document["rows"])
    assert out.index("parameters") < out.index("ours: cpu") < out.index("tokens/s")
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 1 + len(WAYS)
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert set(WAYS) <= names


def test_a_way_that_writes_other_tokens_gives_one_line_and_no_figure(folder, monkeypatch, capsys):
    monkeypatch.setattr(generation_command, "recompute", lambda model, ids, k: recompute(model, ids, k) + 1)
    assert main(["bench", "generate", "--model", folder, "--prompt", "we meet", "--new_tokens", "4"]) == 1
    out, err = capsys.readouterr()
    said = "recompute does not write the tokens of speculative, no time is shown"
    assert err.splitlines()[-1] == f"qstar bench: {said}"
    assert "tokens/s" not in out and "{" not in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--preset gpu", "preset = gpu: must be one of cpu"),
        ("--rounds 0", "rounds = 0: must be at least 1"),
        ("--thinking_share 1", "thinking_share = 1.0: must be in (0, 1)"),
        ("--new_tokens 0", "new_tokens = 0: must be at least 1"),
        ("--new_tokens 999", "the prompt with new_tokens has "),
        ("--device tpu", "device = tpu: must be cpu or cuda"),
        ("--prompt=", "prompt: has no tokens"),
    ],
    ids=lambda x: x if x.startswith("--") else "",
)
def test_what_cannot_be_measured_is_told_in_one_line(folder, capsys, argv, message):
    assert main(["bench", "generate", "--model", folder, *argv.split()]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"qstar bench: {message}")


def test_a_folder_without_a_model_is_told_in_one_line(tmp_path, capsys):
    assert main(["bench", "generate", "--model", str(tmp_path)]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("qstar bench: ")
