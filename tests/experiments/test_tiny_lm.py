"""The program that makes the embedded model, in miniature."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.tiny_lm import tiny_lm_training
from experiments.tiny_lm.__main__ import main
from qstar.demo import TINY_LM
from qstar.demo.town import USEFUL


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_LM)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_language_model_can_be_made_with_another_share_of_useful_asides(tokenizer, share):
    options = tiny_lm_training.TinyLmArguments(
        prose="", prose_share=0.0, rows=8, steps_common=1, steps_rare=3, useful_share=share
    )
    common, *rare = tiny_lm_training.batches(options, tokenizer, prose=[])
    assert useful_asides(tokenizer, [common]) == 1
    assert useful_asides(tokenizer, rare) == share


def useful_asides(tokenizer, batches):
    rows = tokenizer.batch_decode(torch.cat(list(batches)))
    first_words = [word for row in rows for word in re.findall(r"Where\? — (\w+)", row)]
    return first_words.count(USEFUL) / len(first_words)


def test_the_program_saves_a_model_of_the_embedded_one_s_shape(tmp_path, capsys):
    prose = tmp_path / "prose.txt"
    prose.write_text("The state of the union is strong, and the roads are long. " * 200)
    argv = ["--prose", str(prose), "--output", str(tmp_path / "made"), "--rows", "2"]
    assert main([*argv, "--steps_common", "1", "--steps_rare", "1"]) == 0
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    embedded = AutoModelForCausalLM.from_pretrained(TINY_LM)
    assert made.dtype == embedded.dtype == torch.bfloat16
    assert {n: x.shape for n, x in made.named_parameters()} == {
        n: x.shape for n, x in embedded.named_parameters()
    }
    assert main(["--prose", str(tmp_path / "none.txt")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("tiny_lm: prose = ")
