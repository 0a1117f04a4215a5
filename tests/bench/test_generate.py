"""`qstar bench generate`: the published way writes the same tokens, and the document has its keys."""

from __future__ import annotations

import json

import pytest
import torch
from qstar_bench.generate import main, recompute
from tiny_models import thinking_model, tokens, write
from tiny_tokenizer import saved_base_model

from qstar import QuietStarConfig, QuietStarForCausalLM


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_recomputing_everything_for_each_token_writes_the_tokens_of_the_generator(kind):
    model = thinking_model(kind, mix=0.1)
    out = write(model, tokens(1, 9), max_new_tokens=6, thought_temperature=0.0).sequences
    assert [recompute(model, out[:, :n], 3) for n in range(9, 15)] == out[0, 9:].tolist()


def test_the_command_prints_a_table_and_ends_with_its_document(tmp_path, capsys):
    base = saved_base_model(tmp_path / "base", max_position_embeddings=256)
    model = QuietStarForCausalLM.from_base(str(base), QuietStarConfig(), dtype="float32")
    torch.manual_seed(0)
    torch.nn.init.normal_(model.mixing.layers[-1].weight, std=0.05)
    model.save_pretrained(tmp_path / "model")
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "model")
    assert main(["--model", str(tmp_path / "model"), "--prompt", "we meet", "--new_tokens", "12"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    for key in ("speedup_vs_sequential", "speedup_vs_recompute", "adaptive_vs_plain", "steps_per_token"):
        assert document[key] > 0
    assert 0 <= document["acceptance_rate"] <= 1
    assert [row["way"] for row in document["ways"]] == [
        "plain", "adaptive", "speculative", "sequential", "recompute",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="preset = gpu: must be one of cpu"):
        main(["--model", str(tmp_path / "model"), "--preset", "gpu"])
