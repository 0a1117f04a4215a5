"""Thinking at given positions: there, where a target follows, and nowhere else."""

import pytest
import torch
from tiny_models import thinking_model, tokens

from qstar.data import collate
from qstar.layout import IGNORE, TextRows, ThoughtLayout

IDS = tokens(2, 10)
MASK = torch.tensor([[0, 0, 1, 0, 0, 1, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 0, 1, 0]])


@pytest.mark.parametrize("where", [{}, {"thinking_positions": "random", "thinking_fraction": 0.2}], ids=str)
def test_the_layout_has_just_these_positions_whatever_the_config_would_choose(where):
    model, rows = thinking_model(**where), TextRows.from_batch(IDS)
    layout = ThoughtLayout.plan(rows, rows.predicts(IDS), model.quiet_star, think_mask=MASK)
    # the last token of a text has no target after it
    assert [p[v].tolist() for p, v in zip(layout.positions, layout.valid)] == [[2, 5], [8]]


def test_the_mixed_loss_is_that_of_these_positions_among_all():
    everywhere, some = thinking_model(talk_length=1), thinking_model(talk_length=1)
    thoughts = torch.randint(2, 60, (2, 9, 2, 3), generator=torch.Generator().manual_seed(5))
    alone = []
    for row, t in ((0, 2), (0, 5), (1, 8)):
        labels = torch.full_like(IDS, IGNORE)
        labels[row, t + 1] = IDS[row, t + 1]
        given = thoughts[:, :1].clone()
        given[row, 0] = thoughts[row, t]
        alone.append(everywhere(IDS, labels=labels, thoughts=given).metrics["mixed_nll"])
    given = torch.zeros(2, 2, 2, 3, dtype=torch.long)
    given[0, 0], given[0, 1], given[1, 0] = thoughts[0, 2], thoughts[0, 5], thoughts[1, 8]
    output = some(IDS, think_mask=MASK, thoughts=given)
    torch.testing.assert_close(output.metrics["mixed_nll"], torch.stack(alone).mean(), rtol=1e-5, atol=0)
    assert output.metrics["thoughts"] == 3 * 2
    base = everywhere(IDS).metrics["base_nll"]
    assert torch.equal(output.metrics["base_nll"], base)  # the text's own loss is that of all its targets


def test_the_uncertain_are_not_asked_for_where_the_positions_are_given():
    model = thinking_model(thinking_positions="uncertain", thinking_fraction=0.5)
    assert model(IDS, think_mask=MASK).metrics["thoughts"] == 3 * 2


def test_a_mask_of_another_shape_or_without_a_position_is_refused():
    model = thinking_model()
    with pytest.raises(
        ValueError, match=r"^think_mask has shape \(2, 9\): must be that of input_ids, \(2, 10\)"
    ):
        model(IDS, think_mask=MASK[:, :9])
    with pytest.raises(ValueError, match=r"^think_mask: no position that it chooses has a target after it$"):
        model(IDS, think_mask=torch.zeros_like(MASK).index_fill(1, torch.tensor(9), 1))


def test_rows_bring_their_mask_and_labels_through_the_collator():
    rows = [
        {
            "input_ids": [5, 6, 7],
            "position_ids": [0, 1, 2],
            "labels": [5, IGNORE, 7],
            "think_mask": [0, 1, 0],
        },
        {"input_ids": [8, 9], "position_ids": [0, 1], "labels": [IGNORE, 9], "think_mask": [1, 0]},
    ]
    batch = collate(rows)
    assert batch["think_mask"].tolist() == [[0, 1, 0], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, IGNORE, 7], [IGNORE, 9, IGNORE]]
    plain = collate([{n: row[n] for n in ("input_ids", "position_ids")} for row in rows])
    assert plain.keys() == batch.keys() - {"think_mask"}
    assert plain["labels"].tolist() == [[IGNORE, 6, 7], [IGNORE, 9, IGNORE]]
