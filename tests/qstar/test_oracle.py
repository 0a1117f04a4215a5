"""The packed passes against the slow truth: one position, one thought, one plain forward at a time."""

import pytest
import torch
from tiny_models import ARCHITECTURES, base_model, plain_slots, thinking_model, tokens, write

from qstar.layout import TextRows, ThoughtLayout

KINDS = list(ARCHITECTURES)


def think(model, input_ids, rows=None, **options):
    rows = rows or TextRows.from_batch(input_ids)
    hidden, keys_values = model.thinker.read_text(input_ids, rows)
    layout = ThoughtLayout.plan(rows, rows.predicts(input_ids), model.quiet_star)
    return model.thinker.think(input_ids, hidden, keys_values, layout, **options)


def eager_twin(model, kind):
    twin = base_model(kind)
    twin.load_state_dict(model.base.state_dict())
    twin.set_attn_implementation("eager")
    return twin


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_slot_hidden_states_equal_one_position_at_a_time(kind):
    model = thinking_model(kind)
    ids = tokens(2, 12)
    thought = think(model, ids, generator=torch.Generator().manual_seed(3))
    eager = eager_twin(model, kind)
    k, m = model.quiet_star.thought_length, model.quiet_star.talk_length
    compared = 0
    for b, p, r in torch.cartesian_prod(torch.arange(2), torch.arange(11), torch.arange(2)).tolist():
        t = int(thought.layout.positions[b, p])
        talk = ids[b, t + 1 : t + m]
        truth = plain_slots(model, eager, ids[b, : t + 1], thought.tokens[b, p, r], talk)
        ours = thought.slot_hidden[b, p, r, : k + 2 + len(talk)]
        assert (ours - truth).abs().max() <= 1e-5 * truth.abs().max()
        compared += len(truth)
    assert compared > 2 * 11 * 2 * (k + 2)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_sampled_thought_is_the_argmax_of_the_plain_model(kind):
    model = thinking_model(kind, thought_temperature=0.0, num_thoughts=1)
    ids = tokens(1, 9)
    thought = think(model, ids)
    eager = eager_twin(model, kind)
    for p in range(8):
        written = thought.tokens[0, p, 0]
        hidden = plain_slots(model, eager, ids[0, : p + 1], written, ids[0, :0])[: len(written)]
        scores = eager.get_output_embeddings()(hidden)
        scores[:, model.suppress] = -torch.inf
        assert scores.argmax(-1).tolist() == written.tolist()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_zero_mixing_weight_gives_the_base_logits_bit_for_bit(kind):
    model = thinking_model(kind, mix=0.0)
    ids = tokens(2, 12)
    thought = think(model, ids)
    w = thought.mix_weight[..., 0][..., None]
    mixed = (1 - w) * thought.base_hidden[:, :, :, 0] + w * thought.talk_hidden[:, :, :, 0]
    untouched = base_model(kind)
    expected = untouched(input_ids=ids).logits
    text_hidden, _ = model.thinker.read_text(ids, TextRows.from_batch(ids))
    hidden = torch.cat([mixed[:, :, 0], text_hidden[:, -1:]], dim=1)
    logits = model.base.get_output_embeddings()(hidden)
    cap = model.linear_head().softcap
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    assert torch.equal(logits, expected)
    assert torch.equal(model.base(input_ids=ids).logits, expected)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
@torch.no_grad()
def test_editing_a_later_token_never_changes_an_earlier_positions_loss(kind):
    model = thinking_model(kind)
    ids = tokens(1, 14)
    drawn = think(model, ids, generator=torch.Generator().manual_seed(3))
    edited = ids.clone()
    edited[0, 9] = (edited[0, 9] + 7) % 50 + 2
    again = think(model, edited, thoughts=drawn.tokens)
    m = model.quiet_star.talk_length
    untouched = drawn.layout.positions[0] + m - 1 < 9  # no talk token of theirs is the edited one
    assert 0 < int(untouched.sum()) < 13
    assert torch.equal(drawn.mix_weight[0, untouched], again.mix_weight[0, untouched])
    assert torch.equal(drawn.slot_hidden[0, untouched], again.slot_hidden[0, untouched])
    assert not torch.equal(drawn.slot_hidden[0, ~untouched], again.slot_hidden[0, ~untouched])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_generating_equals_the_parallel_forward_at_the_last_position(kind):
    model = thinking_model(kind, thought_temperature=0.0, num_thoughts=1, talk_length=1)
    short, long = tokens(1, 5, seed=1)[0], tokens(1, 9, seed=2)[0]
    ids = torch.zeros(2, 9, dtype=torch.long)
    ids[0, 4:], ids[1] = short, long
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    out = write(model, ids, mask, max_new_tokens=4)
    assert out.new_tokens.shape == (2, 4)
    for b, prompt in enumerate((short, long)):
        text = torch.cat([prompt, out.new_tokens[b], torch.tensor([5])])[
            None
        ]  # one more, so that every token predicts
        thought = think(model, text)
        for step in range(4):
            p = len(prompt) - 1 + step
            assert thought.tokens[0, p, 0].tolist() == out.thoughts[b, step].tolist()
            w = thought.mix_weight[0, p, 0, 0]
            scores = [_logits(model, x[0, p, 0, 0]) for x in (thought.base_hidden, thought.talk_hidden)]
            expected = (1 - w) * scores[0] + w * scores[1]
            error = (out.logits[b, step] - expected).abs().max()
            assert error <= 1e-5 * expected.abs().max()
            assert abs(float(out.mix_weight[b, step] - w)) <= 1e-5 * max(1, abs(float(w)))


def _logits(model, hidden):
    scores = model.base.get_output_embeddings()(hidden)
    cap = model.linear_head().softcap
    return scores if cap is None else torch.tanh(scores / cap) * cap
