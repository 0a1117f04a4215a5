"""The twelve defects of the published code (see the method's documentation), each with a test that fails on
it."""

import copy
import warnings

import pytest
import torch
from tiny_models import base_model, thinking_model, tokens, write
from transformers import AutoModelForCausalLM

from qstar import QuietStarConfig, QuietStarForCausalLM, objective
from qstar.data import collate
from qstar.evaluation.held_out import held_out
from qstar.layout import IGNORE, TextRows, ThoughtLayout


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_1_boundaries_and_mixing_head_survive_saving_and_the_first_forward(tmp_path):
    model = thinking_model()
    model.save_pretrained(tmp_path)
    loaded = QuietStarForCausalLM.from_pretrained(tmp_path)
    ids = tokens(2, 10)
    expected, found = model(ids, generator=seeded()), loaded(ids, generator=seeded())
    assert torch.equal(expected.loss, found.loss)
    states = model.state_dict(), loaded.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_2_temperature_zero_is_argmax_and_temperature_changes_the_distribution():
    ids = tokens(4, 20)

    def thoughts(temperature, seed):
        model = thinking_model(thought_temperature=temperature, num_thoughts=4)
        rows = TextRows.from_batch(ids)
        hidden, text = model.thinker.read_text(ids, rows)
        layout = ThoughtLayout.plan(rows, rows.predicts(ids), model.quiet_star)
        with torch.no_grad():
            return model.thinker.think(ids, hidden, text, layout, generator=seeded(seed)).tokens

    assert torch.equal(thoughts(0.0, 1), thoughts(0.0, 2))
    assert not torch.equal(thoughts(1.0, 1), thoughts(1.0, 2))
    agreement = {t: (thoughts(t, 1) == thoughts(0.0, 1)).float().mean() for t in (0.2, 1.0, 5.0)}
    assert agreement[0.2] > agreement[1.0] > agreement[5.0]


def test_3_rewards_of_a_bf16_model_are_fp32_and_do_not_round_to_zero():
    model = thinking_model(mix=0.0)
    with torch.no_grad():
        model.mixing.layers[2].bias.fill_(1.0)
        model.mixing.layers[4].weight.fill_(1e-3 / 32)
    model.base.to(torch.bfloat16)
    assert model.mixing.layers[0].weight.dtype == torch.float32
    rewards = []
    original = objective.reward
    ids = tokens(2, 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "reward", lambda *a: rewards.append(original(*a)) or rewards[-1])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            metrics = model(ids, generator=seeded()).metrics
    assert rewards[0].dtype == torch.float32
    assert all(value.dtype in (torch.float32, torch.int64) for value in metrics.values())
    assert 0 < metrics["mix_weight_mean"] < 1e-2
    assert (rewards[0] == 0).float().mean() < 0.05


def test_4_low_precision_parameters_are_warned_about_and_fp32_masters_move():
    ids = tokens(2, 12)
    model = thinking_model().to(torch.bfloat16).train()
    with pytest.warns(UserWarning, match=r"bfloat16.*float32"):
        model(ids, generator=seeded())
    masters = thinking_model().train()
    before = copy.deepcopy(masters.state_dict())
    optimizer = torch.optim.AdamW(masters.parameters(), lr=1e-6)
    with warnings.catch_warnings(), torch.autocast("cpu", dtype=torch.bfloat16):
        warnings.simplefilter("error")
        loss = masters(ids, generator=seeded()).loss
    loss.backward()
    optimizer.step()
    moved = [(masters.state_dict()[n] != x).float().mean() for n, x in before.items() if "proj" in n]
    assert min(moved) > 0.5


@torch.no_grad()
def test_5_generation_reads_the_same_slots_as_training_in_any_batch_with_left_padding():
    model = thinking_model(thought_temperature=0.0)
    long, short = tokens(1, 8, seed=4), tokens(1, 5, seed=5)
    alone = [write(model, x, max_new_tokens=3) for x in (long, short)]
    ids = torch.cat([long, torch.nn.functional.pad(short, (3, 0), value=9)])
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    both = write(model, ids, mask, max_new_tokens=3)
    assert both.thoughts.shape[-1] == model.quiet_star.thought_length
    for row, single in enumerate(alone):
        assert torch.equal(both.new_tokens[row], single.new_tokens[0])
        assert torch.equal(both.thoughts[row], single.thoughts[0])
        assert (both.logits[row] - single.logits[0]).abs().max() <= 1e-5 * single.logits.abs().max()


def test_6_padding_is_no_part_of_any_mean_and_a_padding_id_that_is_eos_is_learned():
    model = thinking_model(num_thoughts=2)
    text = tokens(1, 11)
    text[0, -1] = 1  # eos
    generator = seeded()
    alone = model(text, thoughts=_fixed_thoughts(10, 2, 3))
    assert generator is not None
    for left, right in ((0, 4), (3, 0), (2, 5)):
        ids = torch.nn.functional.pad(text, (left, right), value=1)
        mask = torch.nn.functional.pad(torch.ones_like(text), (left, right))
        padded = model(ids, attention_mask=mask, thoughts=_fixed_thoughts(10, 2, 3))
        for name, value in alone.metrics.items():
            assert torch.allclose(padded.metrics[name].float(), value.float(), rtol=1e-5, atol=1e-6), name
    labels = collate([{"input_ids": text[0].tolist(), "position_ids": list(range(11))}])["labels"]
    assert labels[0, -1] == 1


def _fixed_thoughts(positions, copies, length):
    return torch.randint(2, 50, (1, positions, copies, length), generator=seeded(7))


def test_6_talk_tokens_come_from_the_text_not_from_the_labels():
    model = thinking_model(base_weight=0.0, policy_weight=0.0)
    ids = tokens(1, 10)
    some = ids.clone()
    some[0, :6] = IGNORE
    thoughts = _fixed_thoughts(9, 2, 3)
    whole = _mixed(model, ids, ids, thoughts)
    masked = _mixed(model, ids, some, thoughts[:, -5:])  # positions 4..8 still predict something
    assert torch.allclose(whole[:, -5:][masked != 0], masked[masked != 0], rtol=1e-5)
    assert (masked != 0).sum() == 2 * (4 + 4)


def _mixed(model, ids, labels, thoughts):
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        original = objective.mixed_loss
        patch.setattr(
            objective, "mixed_loss", lambda nll, valid: kept.append(nll.detach()) or original(nll, valid)
        )
        model(ids, labels=labels, thoughts=thoughts)
    return kept[0]


@pytest.mark.parametrize("thought_length", [0, 1, 2])
def test_7_short_thoughts_work(thought_length):
    model = thinking_model(thought_length=thought_length).train()
    output = model(tokens(2, 9), generator=seeded())
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert model.boundary.start_raw.grad.abs().max() > 0
    if thought_length == 0:
        assert output.metrics["policy_loss"] == 0


def test_7_masked_labels_and_no_attention_mask_work():
    model = thinking_model()
    labels = tokens(2, 9)
    labels[:, ::2] = IGNORE
    assert torch.isfinite(model(tokens(2, 9), labels=labels, generator=seeded()).loss)


def test_7_a_text_no_longer_than_the_talk_length_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^input_ids has 4 tokens: .*talk_length = 4$"):
        thinking_model(talk_length=4)(tokens(1, 4))


def test_7_gradient_checkpointing_changes_no_gradient():
    ids = tokens(2, 10)
    plain, checkpointed = thinking_model().train(), thinking_model().train()
    checkpointed.base.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (plain, checkpointed):
        model(ids, generator=seeded()).loss.backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), checkpointed.named_parameters()):
        assert torch.equal(a.grad, b.grad), name


def test_7_reentrant_checkpointing_which_loses_gradients_is_refused():
    model = thinking_model().train()
    model.base.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant = True"):
        model(tokens(1, 10))


def test_8_boundaries_are_outside_the_vocabulary_and_the_base_loads_with_stock_transformers(tmp_path):
    model = thinking_model()
    rows = model.base.get_input_embeddings().weight.shape[0]
    assert rows == base_model().get_input_embeddings().weight.shape[0]
    assert not any("boundary" in name for name in model.base.state_dict())
    model.save_pretrained(tmp_path)
    stock, ids = AutoModelForCausalLM.from_pretrained(tmp_path), tokens(2, 8)
    assert torch.equal(stock(input_ids=ids).logits, model.base(input_ids=ids).logits)


@torch.no_grad()
def test_8_no_prompt_can_hold_a_boundary():
    model = thinking_model(thought_temperature=0.0)
    every = torch.arange(61)[None]
    first = write(model, every, max_new_tokens=2)
    model.boundary.start_raw.add_(1.0)
    assert torch.equal(model.get_input_embeddings()(every), base_model().get_input_embeddings()(every))
    moved = write(model, every, max_new_tokens=2)
    assert not torch.equal(first.logits, moved.logits)


def test_9_held_out_evaluation_never_holds_the_logits_of_all_tokens():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(x, torch.Tensor):
                    Largest.largest = max(Largest.largest, x.numel())
            return result

    vocabulary = 80_000
    base = base_model(vocab_size=vocabulary)
    model = QuietStarForCausalLM.from_base(base, QuietStarConfig(thought_length=1, talk_length=1))
    rows = [
        {"input_ids": tokens(1, 80, seed=i)[0].tolist(), "position_ids": list(range(80))} for i in range(12)
    ]
    with Largest():
        result = held_out(model, rows, batch_size=12)
    assert len(result.base_nll) == 12 * 79
    assert Largest.largest < 12 * 79 * vocabulary / 1.5


def test_11_both_gradient_norms_are_told_apart_and_advantages_can_be_normalised():
    model = thinking_model(policy_weight=1e3).train()
    output = model(tokens(2, 12), generator=seeded())
    parameters = [p for p in model.parameters() if p.requires_grad]
    norms = objective.gradient_norms({"nll": output.nll_loss, "policy": output.policy_loss}, parameters)
    output.loss.backward()
    total = torch.stack([p.grad.norm() for p in parameters]).norm()
    assert norms["policy"] > norms["nll"] > 0
    assert abs(norms["policy"] - norms["nll"]) <= total <= norms["policy"] + norms["nll"]
    reward = torch.randn(3, 5, 4, generator=seeded())
    rewarded = torch.ones(3, 5, dtype=torch.bool)
    small = objective.advantage(reward * 1e-3, rewarded, "normalized")
    assert torch.allclose(small, objective.advantage(reward * 1e3, rewarded, "normalized"), rtol=1e-4)
    assert objective.advantage(reward * 1e-3, rewarded).max() < 1e-2


def test_12_a_long_prompt_is_refused_not_cropped():
    with pytest.raises(ValueError, match=r"exceed the model's context of 96"):
        write(thinking_model(), tokens(1, 95), max_new_tokens=4)
    with pytest.raises(ValueError, match=r"exceed the model's context of 96"):
        thinking_model()(tokens(1, 93))
