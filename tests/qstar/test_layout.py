"""The geometry of a batch against plain loops, and that nothing crosses the border of a document."""

import math
from fractions import Fraction

import pytest
import torch
from tiny_models import ARCHITECTURES, thinking_model, tokens

from qstar import QuietStarConfig
from qstar.layout import IGNORE, TextRows, ThoughtLayout

T = 24


def packed_batch(seed, rows=3):
    """Random rows of T tokens: padding at either side, several documents, some labels left out."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    ids = torch.randint(2, 60, (rows, T), generator=generator)
    mask, position_ids = torch.zeros(rows, T, dtype=torch.long), torch.zeros(rows, T, dtype=torch.long)
    documents = []  # of each row: (start, end)
    for b in range(rows):
        at, stop = (draw(0, 6), T) if b % 2 else (0, T - draw(0, 6))
        documents.append([])
        while at < stop:
            end = min(stop, at + draw(1, 12))
            documents[b].append((at, end))
            mask[b, at:end], position_ids[b, at:end] = 1, torch.arange(end - at)
            at = end
    labels = ids.masked_fill((mask == 0) | (torch.rand(rows, T, generator=generator) < 0.2), IGNORE)
    return ids, mask, position_ids, labels, documents


def plan(ids, mask, position_ids, labels, config, **options):
    rows = TextRows.from_batch(ids, mask, position_ids)
    return rows, ThoughtLayout.plan(rows, rows.predicts(labels), config, **options)


@pytest.mark.parametrize("seed", range(6))
def test_every_index_of_a_packed_padded_batch_equals_a_plain_loop(seed):
    ids, mask, position_ids, labels, documents = packed_batch(seed)
    k, m, R = seed % 3, 1 + seed % 4, 2
    rows, layout = plan(
        ids, mask, position_ids, labels, QuietStarConfig(thought_length=k, talk_length=m, num_thoughts=R)
    )
    for b, row in enumerate(documents):
        expected = []
        for start, end in row:
            assert rows.position_ids[b, start:end].tolist() == list(range(end - start))
            assert set(rows.segment_start[b, start:end].tolist()) == {start}
            assert set(rows.segment_end[b, start:end].tolist()) == {end}
            for t in range(start, end):
                targets = [t + 1 + j < end and labels[b, t + 1 + j] != IGNORE for j in range(m)]
                if any(targets):
                    expected.append((t, start, end, targets))
        assert layout.valid[b].sum() == len(expected)
        for p, (t, start, end, targets) in enumerate(expected):
            assert layout.positions[b, p] == t
            assert layout.target_valid[b, p].tolist() == targets
            assert layout.rewarded[b, p] == (t - start <= (end - start) - 2 - m)
            for j, target in enumerate(targets):
                if target:
                    assert layout.talk_index[b, p, j] == t + j
                    assert layout.target_index[b, p, j] == t + j + 1
            for n in range(p * R, p * R + R):
                assert (layout.prefix_start[b, n], layout.prefix_end[b, n]) == (start, t + 1)
                # <start>, c_1 .. c_k, <end>, talk: counted on from the token that the thought continues
                assert layout.slot_position_ids[b, n].tolist() == [
                    t - start + 1 + s for s in range(k + m + 1)
                ]
        padded = range(len(expected) * R, layout.prefix_end.shape[1])
        assert all(layout.prefix_start[b, n] == layout.prefix_end[b, n] for n in padded)
        assert not layout.rewarded[b, len(expected) :].any()
        assert not layout.target_valid[b, len(expected) :].any()
    assert rows.is_text.tolist() == mask.bool().tolist()


@pytest.mark.parametrize("kind", ["random", "uncertain"])
@pytest.mark.parametrize("fraction", [0.01, 0.07, 0.25, 0.3, 0.7, 1.0])
def test_exactly_the_ceiling_of_fraction_times_candidates_think_in_each_row(kind, fraction):
    length = 101
    config = QuietStarConfig(thinking_positions=kind, thinking_fraction=fraction, talk_length=1)
    mask = torch.ones(100, length, dtype=torch.long)
    for b in range(100):
        mask[b, b + 2 :] = 0  # row b has b + 1 candidates
    rows = TextRows.from_batch(mask, mask)
    entropy = torch.rand(100, length, generator=torch.Generator().manual_seed(0))
    layout = ThoughtLayout.plan(rows, rows.predicts(mask), config, entropy=entropy)
    expected = [math.ceil(Fraction(str(fraction)) * candidates) for candidates in range(1, 101)]
    assert layout.valid.sum(1).tolist() == expected


def test_uncertain_takes_the_candidates_with_the_highest_entropy_in_ascending_order():
    ids, mask, position_ids, labels, _ = packed_batch(3)
    entropy = torch.rand(3, T, generator=torch.Generator().manual_seed(1))
    every = QuietStarConfig(talk_length=2)
    some = QuietStarConfig(talk_length=2, thinking_positions="uncertain", thinking_fraction=0.4)
    _, whole = plan(ids, mask, position_ids, labels, every)
    _, chosen = plan(ids, mask, position_ids, labels, some, entropy=entropy)
    for b in range(3):
        candidates = whole.positions[b, whole.valid[b]].tolist()
        wanted = sorted(candidates, key=lambda t: -entropy[b, t])[: math.ceil(0.4 * len(candidates))]
        assert chosen.positions[b, chosen.valid[b]].tolist() == sorted(wanted)


def test_uncertainty_does_not_depend_on_whether_a_positions_own_next_token_is_a_target():
    model = thinking_model(thinking_positions="uncertain", thinking_fraction=0.5, talk_length=3)
    ids = tokens(1, 16, seed=3)
    rows = TextRows.from_batch(ids)
    logits = model.base(input_ids=ids).logits[0].log_softmax(-1)
    entropy = -(logits.exp() * logits).sum(-1)
    hidden = torch.topk(entropy[:13], 4).indices + 1  # the next tokens of the most uncertain positions
    labels = ids.clone()
    labels[0, hidden] = IGNORE
    planned = []
    with pytest.MonkeyPatch.context() as patch:
        original = ThoughtLayout.plan
        patch.setattr(ThoughtLayout, "plan", lambda *a, **o: planned.append(original(*a, **o)) or planned[-1])
        model(ids, labels=labels)
    whole = ThoughtLayout.plan(rows, rows.predicts(labels), QuietStarConfig(talk_length=3))
    candidates = whole.positions[0].tolist()
    wanted = sorted(candidates, key=lambda t: -entropy[t])[: math.ceil(len(candidates) / 2)]
    assert planned[0].positions[0].tolist() == sorted(wanted)
    assert set((hidden - 1).tolist()) & set(wanted)


def test_random_positions_are_those_of_the_generator():
    ids, mask, position_ids, labels, _ = packed_batch(5)
    config = QuietStarConfig(talk_length=1, thinking_positions="random", thinking_fraction=0.3)

    def positions(seed):
        generator = torch.Generator().manual_seed(seed)
        return plan(ids, mask, position_ids, labels, config, generator=generator)[1].positions

    assert torch.equal(positions(1), positions(1))
    assert not torch.equal(positions(1), positions(2))
    chosen = torch.cat([positions(seed).flatten() for seed in range(40)])
    assert len(chosen.unique()) > 0.8 * (T - 1)  # every position has its turn


KINDS = [*ARCHITECTURES]
# transformers has no sdpa attention with gemma2's soft-cap
ATTENTIONS = [(kind, how) for kind in KINDS for how in ("sdpa", "eager") if (kind, how) != ("gemma2", "sdpa")]


@pytest.mark.parametrize("kind, attention", ATTENTIONS)
@torch.no_grad()
def test_a_packed_row_has_the_losses_of_its_documents_alone(kind, attention):
    model = thinking_model(kind, attention=attention)
    lengths = (9, 8, 10)
    documents = [tokens(1, n, seed=n) for n in lengths]
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    thoughts = torch.randint(2, 60, (1, sum(n - 1 for n in lengths), 2, 3))
    packed = model(torch.cat(documents, 1), position_ids=position_ids, thoughts=thoughts)
    alone, first = [], 0
    for document in documents:
        positions = document.shape[1] - 1
        alone.append(model(document, thoughts=thoughts[:, first : first + positions]).metrics)
        first += positions
    m = model.quiet_star.talk_length
    for name, lost in (("base_nll", 1), ("mixed_nll_1", 1), ("mixed_nll_2", 2), ("reward_mean", m + 1)):
        counts = [n - lost for n in lengths]
        expected = sum(c * x[name] for c, x in zip(counts, alone)) / sum(counts)
        assert abs(packed.metrics[name] - expected) <= 1e-5 * max(1, abs(expected)), name


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_editing_a_document_changes_nothing_in_its_neighbours(kind):
    model = thinking_model(kind)
    ids, edited = tokens(1, 20), tokens(1, 20)
    edited[0, :8] = tokens(1, 8, seed=9)
    position_ids = torch.cat([torch.arange(8), torch.arange(12)])[None]
    rows = TextRows.from_batch(ids, position_ids=position_ids)
    hidden = [model.thinker.read_text(x, rows)[0] for x in (ids, edited)]
    # a mixture of experts sums other tokens in other orders: equal to rounding, where a glance would show at
    # once
    error = (hidden[0][:, 8:] - hidden[1][:, 8:]).abs().max()
    assert error <= 1e-6 * hidden[0].abs().max()
    assert not torch.equal(hidden[0][:, :8], hidden[1][:, :8])


REFUSED = [
    (torch.zeros(4, dtype=torch.long), {}, r"^input_ids has shape \(4,\): must be \[batch, tokens\]$"),
    (torch.zeros(2, 1, dtype=torch.long), {}, r"^input_ids has shape \(2, 1\): .* at least 2 tokens$"),
    (torch.zeros(2, 4, dtype=torch.long), {"attention_mask": torch.ones(2, 5)}, r"^attention_mask has shape"),
    (
        tokens(1, 4),
        {"position_ids": torch.tensor([[0, 1, 5, 6]])},
        r"^position_ids: .* from 0, in steps of 1$",
    ),
]


@pytest.mark.parametrize("ids, options, message", REFUSED, ids=["1d", "one-token", "mask-shape", "positions"])
def test_a_batch_that_is_no_batch_is_refused(ids, options, message):
    with pytest.raises(ValueError, match=message):
        TextRows.from_batch(ids, **options)


def test_position_ids_as_other_libraries_make_them_for_left_padding_are_accepted():
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    theirs = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    rows, expected = (TextRows.from_batch(mask, mask, p) for p in (theirs, None))
    assert torch.equal(rows.position_ids[mask == 1], expected.position_ids[mask == 1])
    assert torch.equal(rows.segment_start[mask == 1], expected.segment_start[mask == 1])
