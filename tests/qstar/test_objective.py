"""Losses, rewards and metrics against plain loops, and their weight in an accumulated batch."""

import math
import statistics

import pytest
import torch
from tiny_models import plain_slots, thinking_model, tokens
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from qstar import objective
from qstar.data import collate
from qstar.layout import IGNORE

B, P, R, M = 2, 5, 3, 4


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(B, P, 1, M, generator=generator) * 4
    mixed = torch.rand(B, P, R, M, generator=generator) * 4
    valid = torch.rand(B, P, 1, M, generator=generator) < 0.7
    rewarded = torch.rand(B, P, generator=generator) < 0.6
    return base, mixed, valid, rewarded


def everywhere():
    return [(b, p, r) for b in range(B) for p in range(P) for r in range(R)]


def test_masked_mean_counts_only_the_mask_and_is_zero_with_a_gradient_of_zero_without_one():
    values = torch.tensor([1.0, float("nan"), 3.0], requires_grad=True)
    assert objective.masked_mean(values, torch.tensor([True, False, True])) == 2
    nowhere = objective.masked_mean(values, torch.zeros(3, dtype=torch.bool))
    nowhere.backward()
    assert nowhere == 0 and torch.equal(values.grad, torch.zeros(3))


def test_mixed_loss_averages_every_talk_step_over_its_own_targets_and_then_the_steps(batch):
    _, mixed, valid, _ = batch
    valid[..., 3] = False  # a talk step without any target counts nowhere
    loss, steps = objective.mixed_loss(mixed, valid)
    expected = [
        statistics.mean(mixed[b, p, r, j].item() for b, p, r in everywhere() if valid[b, p, 0, j])
        for j in range(3)
    ]
    assert steps.tolist() == pytest.approx([*expected, 0.0], rel=1e-6)
    assert loss.item() == pytest.approx(statistics.mean(expected), rel=1e-6)


def test_reward_sums_what_a_thought_saves_on_the_targets(batch):
    base, mixed, valid, _ = batch
    base[0, 0], valid[0, 0] = float("nan"), False
    found = objective.reward(base, mixed, valid)
    for b, p, r in everywhere():
        saved = [(base[b, p, 0, j] - mixed[b, p, r, j]).item() for j in range(M) if valid[b, p, 0, j]]
        assert found[b, p, r].item() == pytest.approx(sum(saved), abs=1e-5)


@pytest.mark.parametrize("copies", [1, 2, 3], ids="R={}".format)
def test_advantage_is_the_positive_part_over_the_mean_of_a_positions_thoughts_and_r_1_has_no_mean(copies):
    reward = torch.randn(B, P, copies, generator=torch.Generator().manual_seed(1))
    rewarded = torch.ones(B, P, dtype=torch.bool)
    rewarded[0, 1] = False
    found = objective.advantage(reward, rewarded)
    for b in range(B):
        for p in range(P):
            own = reward[b, p].tolist()
            mean = statistics.mean(own) if copies > 1 else 0.0
            expected = [max(x - mean, 0.0) if rewarded[b, p] else 0.0 for x in own]
            assert found[b, p].tolist() == pytest.approx(expected, abs=1e-6)
    assert (found > 0).any() and (found == 0).any()


def test_normalised_advantages_are_divided_by_the_deviation_of_the_rewarded_only(batch):
    *_, rewarded = batch
    reward = torch.randn(B, P, R, generator=torch.Generator().manual_seed(1))
    reward[~rewarded] *= 100
    centred = {
        (b, p, r): reward[b, p, r].item() - statistics.mean(reward[b, p].tolist())
        for b, p, r in everywhere()
        if rewarded[b, p]
    }
    deviation = statistics.stdev(centred.values())
    found = objective.advantage(reward, rewarded, "normalized")
    for at in everywhere():
        assert found[at].item() == pytest.approx(max(centred.get(at, 0.0), 0.0) / deviation, abs=1e-5)
    equal = objective.advantage(torch.ones(B, P, R), rewarded, "normalized")
    assert torch.equal(equal, torch.zeros(B, P, R))


def test_policy_mean_counts_also_the_thoughts_without_advantage():
    log_p = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])
    advantage = torch.tensor([0.5, 2.0])
    weights = objective.policy_weights(advantage, thought_length=2, rewarded_thoughts=10)
    found = -(weights[:, None] * log_p).sum()
    assert found.item() == pytest.approx((0.5 * (1 + 2) + 2.0 * (3 + 4)) / 2 / 10)
    none = objective.policy_weights(advantage * 0, thought_length=0, rewarded_thoughts=0)
    assert torch.equal(none, torch.zeros(2))


def test_spread_is_mean_and_deviation_over_the_mask_alone(batch):
    _, mixed, valid, _ = batch
    chosen = [mixed[b, p, r, j].item() for b, p, r in everywhere() for j in range(M) if valid[b, p, 0, j]]
    mean, deviation = objective.spread(mixed, valid)
    assert mean.item() == pytest.approx(statistics.mean(chosen), rel=1e-5)
    assert deviation.item() == pytest.approx(statistics.pstdev(chosen), rel=1e-5)
    assert objective.spread(mixed, torch.zeros_like(valid)) == (0, 0)


def test_gradient_norms_of_the_parts_are_apart_and_leave_the_graph_for_the_backward_to_come():
    a, b, unused = (torch.ones(3, requires_grad=True) for _ in range(3))
    losses = {"one": (3 * a).sum(), "both": (a + 2 * b).sum()}
    norms = objective.gradient_norms(losses, [a, b, unused])
    assert norms == pytest.approx({"one": math.sqrt(27), "both": math.sqrt(3 + 12)})
    assert a.grad is None
    sum(losses.values()).backward()
    assert torch.equal(a.grad, torch.full((3,), 4.0))


def test_the_policy_loss_of_the_model_is_the_mean_over_every_rewarded_thought_and_token():
    model = thinking_model(num_thoughts=3, reinforce_temperature=2.0)
    kept = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("reward", "advantage"):
            original = getattr(objective, name)
            patch.setattr(
                objective, name, lambda *a, _n=name, _f=original: kept.setdefault(_n, (a, _f(*a)))[1]
            )
        ids = tokens(2, 10)
        thoughts = torch.randint(2, 60, (2, 9, 3, 3), generator=torch.Generator().manual_seed(2))
        metrics = model(ids, thoughts=thoughts).metrics
    advantage = kept["advantage"][1]
    total, counted = 0.0, 0
    with torch.no_grad():
        for b in range(2):
            for t in range(10 - 2 - model.quiet_star.talk_length + 1):  # 0 .. T-2-m
                for r in range(3):
                    counted += 1
                    if advantage[b, t, r] > 0:
                        hidden = plain_slots(
                            model, model.base, ids[b, : t + 1], thoughts[b, t, r], ids[b, :0]
                        )
                        scores = model.base.get_output_embeddings()(hidden[:3]) / 2.0
                        scores[:, model.suppress] = -torch.inf
                        log_p = scores.log_softmax(-1).gather(1, thoughts[b, t, r, :, None])
                        total += float(-advantage[b, t, r] * log_p.mean())
    assert metrics["policy_loss"].item() == pytest.approx(total / counted, rel=1e-4)


class Rows(Dataset):
    def __init__(self, lengths):
        self.rows = [self._row(i, lengths_of_row) for i, lengths_of_row in enumerate(lengths)]

    @staticmethod
    def _row(seed, lengths):
        position_ids = [p for n in lengths for p in range(n)]
        return {"input_ids": tokens(1, len(position_ids), seed)[0].tolist(), "position_ids": position_ids}

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def after_one_step(tmp_path, rows, accumulate, **knobs):
    """Parameters after one step of plain gradient descent on all rows, by transformers' own Trainer."""
    model = thinking_model(thought_temperature=0.0, num_thoughts=1, policy_weight=3.0, **knobs)
    args = TrainingArguments(
        tmp_path,
        per_device_train_batch_size=len(rows) // accumulate,
        gradient_accumulation_steps=accumulate,
        max_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    Trainer(model=model, args=args, train_dataset=rows, data_collator=collate).train()
    return model.state_dict()


EQUAL = [((12,), (12,), (12,), (12,)), ((7, 5), (7, 5), (7, 5), (7, 5))]
UNEQUAL = [((12,), (6,), (9,), (4,)), ((7, 5), (12,), (4, 4, 4), (5, 3))]


@pytest.mark.parametrize("lengths", EQUAL, ids=["one-document", "two-documents"])
def test_gradient_accumulation_equals_the_large_batch(tmp_path, lengths):
    rows = Rows(lengths)
    large, accumulated = (after_one_step(tmp_path, rows, n) for n in (1, 2))
    untrained = thinking_model().state_dict()
    for name, x in large.items():
        assert torch.allclose(x, accumulated[name], rtol=1e-5, atol=1e-7), name
    assert sum(not torch.equal(x, untrained[name]) for name, x in large.items()) > 0.9 * len(large)


@pytest.mark.parametrize("lengths", UNEQUAL, ids=["one-document", "packed-documents"])
def test_accumulating_rows_of_unequal_length_weighs_every_target_of_the_text_alike(tmp_path, lengths):
    rows = Rows(lengths)
    with pytest.MonkeyPatch.context() as patch:  # the text's own loss alone
        patch.setattr(objective, "policy_weights", lambda advantage, *_: advantage * 0)
        large, accumulated = (after_one_step(tmp_path, rows, n, base_weight=1.0) for n in (1, 4))
    for name, x in large.items():
        assert torch.allclose(x, accumulated[name], rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("lengths", [*EQUAL, *UNEQUAL], ids=["equal", "equal-packed", "unequal", "packed"])
def test_the_trainer_counts_the_targets_and_the_shares_of_micro_batches_sum_to_one(tmp_path, lengths):
    model = thinking_model(thought_temperature=0.0, num_thoughts=1)
    trainer = Trainer(model=model, args=TrainingArguments(tmp_path, report_to="none"))
    micro = [collate([row]) for row in Rows(lengths)]
    counted = int(trainer._get_num_items_in_batch(micro, "cpu"))
    assert counted == sum(n - 1 for row in lengths for n in row)
    shares = []
    with torch.no_grad():
        for batch in micro:
            whole, weighted = (model(**batch, num_items_in_batch=n).loss for n in (None, counted))
            shares.append(float(weighted / whole))
    assert sum(shares) == pytest.approx(1.0, rel=1e-5)


def test_a_position_whose_label_is_left_out_adds_nothing_to_the_base_loss():
    model = thinking_model()
    ids = tokens(1, 9)
    labels = ids.clone()
    labels[0, 4] = IGNORE
    log_p = model.base(input_ids=ids).logits[0].log_softmax(-1)
    expected = statistics.mean(-log_p[t, ids[0, t + 1]].item() for t in range(8) if t + 1 != 4)
    assert model(ids, labels=labels).metrics["base_nll"].item() == pytest.approx(expected, rel=1e-5)
