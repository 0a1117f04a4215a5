"""Suppressed tokens: never in a thought, and everywhere else as likely as before."""

import torch
from tiny_models import base_model, thinking_model, tokens, write


@torch.no_grad()
def test_suppressed_tokens_never_occur_in_a_thought_and_are_suppressed_nowhere_else():
    suppressed = list(range(2, 50))
    ids = tokens(2, 14)  # many of these are in the text
    assert set(ids.flatten().tolist()) & set(suppressed)
    model = thinking_model(thought_length=6, suppressed_tokens=suppressed, thought_temperature=5.0)
    free = thinking_model(thought_length=6, suppressed_tokens=[], thought_temperature=5.0)
    thoughts = torch.randint(50, 61, (2, 13, 2, 6))
    found = model(ids, thoughts=thoughts).metrics, free(ids, thoughts=thoughts).metrics
    for name in ("base_nll", "mixed_nll", "mixed_nll_1", "mixed_nll_2", "reward_mean"):
        assert torch.equal(found[0][name], found[1][name]), name
    assert not torch.equal(found[0]["policy_loss"], found[1]["policy_loss"])
    log_p = base_model()(input_ids=ids).logits[:, :-1].log_softmax(-1)
    base_nll = -log_p.gather(-1, ids[:, 1:, None]).mean()
    assert torch.allclose(found[0]["base_nll"], base_nll, rtol=1e-5)

    written = write(model, ids, max_new_tokens=20, generator=torch.Generator().manual_seed(0))
    assert not set(written.thoughts.flatten().tolist()) & set(suppressed)
    assert set(written.new_tokens.flatten().tolist()) & set(suppressed)
    unbound = write(free, ids, max_new_tokens=20, generator=torch.Generator().manual_seed(0))
    assert set(unbound.thoughts.flatten().tolist()) & set(suppressed)


def test_by_default_the_special_tokens_are_suppressed():
    assert thinking_model().quiet_star.suppressed_tokens == [0, 1]  # bos and eos of the tiny models
