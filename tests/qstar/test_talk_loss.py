"""The loss of the prediction after a thought alone (w = 1), and what is logged of thoughts and weights."""

import pytest
import torch
from tiny_models import thinking_model, tokens
from torch.nn.functional import cross_entropy

from qstar import step
from qstar.layout import TextRows, ThoughtLayout

IDS = tokens(2, 10)
THOUGHTS = torch.randint(2, 60, (2, 9, 2, 3), generator=torch.Generator().manual_seed(5))


def by_hand(model):
    """(base NLL, NLL at w = 1, w) [B, P, R, m] with gradient, and where there is a target."""
    rows = TextRows.from_batch(IDS)
    hidden, text = model.thinker.read_text(IDS, rows)
    layout = ThoughtLayout.plan(rows, rows.predicts(IDS), model.quiet_star)
    thought = model.thinker.think(IDS, hidden, text, layout, thoughts=THOUGHTS)
    head, shape = model.base.get_output_embeddings(), thought.mix_weight.shape
    target = IDS.gather(1, layout.target_index.flatten(1)).view(*layout.target_index.shape)
    target = target[:, :, None].expand(shape)

    def nll(hidden):
        scores = head(hidden.expand(*shape, -1)).flatten(0, -2)
        if model.linear_head().softcap is not None:
            scores = model.linear_head().softcap * torch.tanh(scores / model.linear_head().softcap)
        return cross_entropy(scores, target.flatten(), reduction="none").view(shape)

    valid = layout.target_valid[:, :, None].expand(shape)
    return nll(thought.base_hidden), nll(thought.talk_hidden), thought.mix_weight, valid


def mean(values, valid):
    """Of the means of every talk step."""
    return torch.stack([values[..., j][valid[..., j]].mean() for j in range(values.shape[-1])]).mean()


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_it_is_added_with_its_weight_and_so_is_every_gradient_of_it(kind):
    def gradients(loss, model):
        loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    found, without, truth = (thinking_model(kind, talk_weight=w).double() for w in (0.7, 0.0, 0.0))
    parts = [m(IDS, thoughts=THOUGHTS).loss for m in (found, without)]
    _, talk, _, valid = by_hand(truth)
    expected = 0.7 * mean(talk, valid)
    torch.testing.assert_close(parts[0] - parts[1], expected, rtol=1e-6, atol=0)
    with_it, without_it, of_it = (
        gradients(x, m) for x, m in zip((*parts, expected), (found, without, truth))
    )
    assert "boundary.end_raw" in of_it and not any(n.startswith("mixing.") for n in of_it)
    for name, gradient in with_it.items():
        added = gradient - without_it[name]
        error = (added - of_it.get(name, torch.zeros_like(added))).norm()
        assert error <= 1e-5 * gradient.norm(), name


def test_the_metrics_tell_what_thoughts_save_alone_and_the_sign_of_their_weights():
    model = thinking_model(seed=5)
    metrics = model(IDS, thoughts=THOUGHTS).metrics
    base, talk, w, valid = by_hand(model)
    torch.testing.assert_close(metrics["talk_gain"], (base - talk)[valid].mean(), rtol=1e-5, atol=1e-6)
    share = (w[valid] > 0).float().mean()
    assert metrics["mix_weight_positive"] == share and 0 < share < 1


def test_without_the_loss_only_some_targets_are_looked_at_evenly_spread_and_the_loss_is_the_same(monkeypatch):
    model = thinking_model()
    whole = model(IDS, thoughts=THOUGHTS)
    monkeypatch.setattr(step, "TALK_TARGETS", 20)
    some = model(IDS, thoughts=THOUGHTS)
    base, talk, _, valid = by_hand(model)
    every = -(-int(valid.sum()) // 20)
    assert every > 1
    expected = (base - talk)[valid][::every].mean()
    torch.testing.assert_close(some.metrics["talk_gain"], expected, rtol=1e-5, atol=1e-6)
    assert some.metrics["talk_gain"] != whole.metrics["talk_gain"]
    assert torch.equal(some.loss, whole.loss)


def test_a_policy_weight_of_zero_leaves_the_policy_out():
    model = thinking_model(policy_weight=0.0)
    output = model(IDS, thoughts=THOUGHTS)
    assert output.policy_loss == 0 and output.metrics["policy_loss"] == 0
    assert torch.equal(output.loss, output.nll_loss)
    assert output.metrics["positive_advantages"] > 0
