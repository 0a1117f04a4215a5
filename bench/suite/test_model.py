"""The embedded model of `qstar demo`: a training step, and some generated tokens."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from qstar import QuietStarConfig, QuietStarForCausalLM
from qstar.demo import TINY_LM


@pytest.fixture(scope="module")
def model():
    base = AutoModelForCausalLM.from_pretrained(TINY_LM, dtype=torch.float32)
    return QuietStarForCausalLM.from_base(base, QuietStarConfig(thought_length=6, talk_length=2))


@pytest.fixture
def text(model):
    """[2, 48]."""
    V = model.base.config.vocab_size
    return torch.randint(3, V, (2, 48), generator=torch.Generator().manual_seed(0))


def test_training_step(benchmark, model, text):
    model.train()

    def step():
        model.zero_grad(set_to_none=True)
        model(text, generator=torch.Generator().manual_seed(0)).loss.backward()

    benchmark(step)


def test_generation(benchmark, model, text):
    """Eight tokens, a thought before each, greedy."""
    model.eval()
    options = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0, "thought_temperature": 0.0}
    benchmark(lambda: model.generate(text[:1], **options))
