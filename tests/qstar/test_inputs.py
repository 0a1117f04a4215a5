"""Batches and prompts at the edge of what is allowed, and just beyond it."""

import pytest
import torch
from tiny_models import thinking_model, tokens, write

from qstar.evaluation.held_out import held_out
from qstar.layout import IGNORE

CONTEXT = 96
THOUGHTS = torch.randint(2, 60, (2, 9, 2, 3), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("how", ["attention_mask", "labels"])
def test_a_row_of_padding_or_without_targets_adds_nothing(how):
    model, ids = thinking_model().train(), tokens(2, 10)
    alone = model(ids[:1], thoughts=THOUGHTS[:1])
    given = torch.ones_like(ids) if how == "attention_mask" else ids.clone()
    given[1] = 0 if how == "attention_mask" else IGNORE
    both = model(ids, thoughts=THOUGHTS, **{how: given})
    both.loss.backward()
    assert torch.allclose(both.loss, alone.loss, rtol=1e-5)
    for name, value in alone.metrics.items():
        assert torch.allclose(both.metrics[name].float(), value.float(), rtol=1e-5, atol=1e-6), name
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_text_that_just_fits_the_context_works_and_one_token_more_is_refused(kind):
    model = thinking_model(kind)
    fits = CONTEXT - model.quiet_star.slots + 1
    assert torch.isfinite(model(tokens(1, fits)).loss)
    with pytest.raises(ValueError, match=rf"^input_ids has {fits + 1} tokens: .* context of {CONTEXT}$"):
        model(tokens(1, fits + 1))
    row = {"input_ids": tokens(1, CONTEXT)[0].tolist(), "position_ids": list(range(CONTEXT))}
    with pytest.raises(ValueError, match=rf"^a held-out row has {CONTEXT} tokens"):
        held_out(model, [row])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_generation_that_just_fits_the_context_works_and_one_token_more_is_refused(kind):
    model = thinking_model(kind)
    new = CONTEXT - 90 + 1 - (model.quiet_star.thought_length + 2)
    assert write(model, tokens(1, 90), max_new_tokens=new).new_tokens.shape == (1, new)
    with pytest.raises(ValueError, match=rf"^max_new_tokens = {new + 1}: .* context of {CONTEXT}$"):
        write(model, tokens(1, 90), max_new_tokens=new + 1)


def test_generation_stops_when_every_row_has_ended_and_pads_the_rows_that_ended_before():
    model, ids = thinking_model(thought_temperature=0.0), tokens(2, 5)
    free = write(model, ids, max_new_tokens=6).new_tokens
    first = int(free[0, 0])
    ended = write(model, ids, max_new_tokens=6, eos_token_id=first, pad_token_id=60).new_tokens
    assert ended[0].tolist() == [first] + [60] * (ended.shape[1] - 1)
    until = free[1].tolist().index(first) + 1 if first in free[1] else 6
    assert ended[1].tolist() == free[1, :until].tolist()
    assert write(model, ids[:1], max_new_tokens=6, eos_token_id=first).new_tokens.tolist() == [[first]]


def test_one_token_in_and_one_token_out_and_thoughts_of_length_zero_work():
    out = write(thinking_model(), tokens(2, 1), max_new_tokens=1, thought_length=0)
    assert out.new_tokens.shape == out.mix_weight.shape == (2, 1)
    assert out.thoughts.shape == (2, 1, 0)


@pytest.mark.parametrize("training", [True, False])
def test_generating_leaves_the_model_in_its_mode(training):
    model = thinking_model().train(training)
    write(model, tokens(1, 3), max_new_tokens=1)
    assert model.training == model.base.training == training


def _refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_labels_of_another_shape_ids_outside_the_vocabulary_and_no_target_at_all_are_refused():
    model, ids = thinking_model(), tokens(2, 8)
    _refused(lambda: model(ids, labels=ids[:, :5]), r"^labels has shape \(2, 5\): must be that of input_ids")
    _refused(lambda: model(ids, labels=torch.full_like(ids, IGNORE)), r"^labels: there is no target")
    for wrong in (61, -1):
        bad = ids.clone()
        bad[1, 3] = wrong
        _refused(lambda bad=bad: model(bad), rf"^input_ids = {wrong}: must be in \[0, 61\)$")
        _refused(lambda bad=bad: write(model, bad), rf"^input_ids = {wrong}: must be in \[0, 61\)$")


def test_masks_that_generation_cannot_follow_are_refused():
    model, ids = thinking_model(), tokens(2, 4)
    right, empty = torch.ones_like(ids), torch.ones_like(ids)
    right[0, 3], empty[1] = 0, 0
    _refused(lambda: write(model, ids, right), r"^attention_mask: padding must be on the left$")
    _refused(lambda: write(model, ids, empty), r"^attention_mask: a row is empty$")
    _refused(lambda: write(model, ids, right[:, :3]), r"^attention_mask has shape \(2, 3\): must be that of")
