"""Where `<start>` and `<end>` begin: each from a token of its own."""

import pytest
import torch
from tiny_models import base_model
from tiny_tokenizer import tiny_tokenizer

from qstar import QuietStarConfig, QuietStarForCausalLM


def begun(em_dash=True, **knobs):
    tokenizer = tiny_tokenizer(em_dash=em_dash)
    base = base_model(vocab_size=len(tokenizer))
    model = QuietStarForCausalLM.from_base(base, QuietStarConfig(**knobs), tokenizer=tokenizer)
    return model, tokenizer, base.get_input_embeddings().weight


def test_each_begins_from_the_embedding_of_its_own_token():
    model, tokenizer, table = begun(start_token="a", end_token=" —", boundary_scale=10.0)
    for text, found in (("a", model.boundary.start), (" —", model.boundary.end)):
        (token,) = tokenizer.encode(text, add_special_tokens=False)
        torch.testing.assert_close(found, table[token])
    assert not torch.equal(model.boundary.start, model.boundary.end)


@pytest.mark.parametrize("name", ["start_token", "end_token"])
@pytest.mark.parametrize("text", ["zqx", "♞"])
def test_a_text_that_is_no_dash_and_not_one_token_is_refused_by_name(name, text):
    with pytest.raises(ValueError, match=rf"^{name} = '{text}': must be one token of this model, but is \d$"):
        begun(**{name: text})


def test_a_dash_may_be_another_dash_but_without_a_tokenizer_no_other_text_can_be_found(caplog):
    model, tokenizer, table = begun(em_dash=False)
    (token,) = tokenizer.encode("-", add_special_tokens=False)
    torch.testing.assert_close(model.boundary.start, table[token])
    assert "end_token = '—' is no single token of this model: using -" in caplog.text
    with pytest.raises(ValueError, match=r"^start_token = ' is': must be a dash without a tokenizer$"):
        QuietStarForCausalLM.from_base(base_model(), QuietStarConfig(start_token=" is"))
