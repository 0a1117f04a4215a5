"""What one process alone can show of a batch shared out: what is counted, and which numbers are drawn."""

import pytest
import torch
from tiny_models import thinking_model, tokens

from qstar.data import collate
from qstar.distributed_random import rand


def test_one_process_draws_what_torch_does():
    numbers = rand(3, 2, 5, torch.Generator().manual_seed(1), torch.device("cpu"), torch.float64)
    assert torch.equal(
        numbers, torch.rand(3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    )


def test_counts_of_another_model_are_refused():
    model, items = thinking_model(), thinking_model(talk_length=3).count_items(tokens(2, 10))
    with pytest.raises(
        ValueError, match=r"^num_items_in_batch has shape \(5,\): must be one number, .* \(4,\)"
    ):
        model(tokens(2, 10), num_items_in_batch=items)


def test_what_is_counted_are_targets_those_of_each_talk_step_and_rewarded_positions():
    rows = [{"input_ids": [5] * n, "position_ids": list(range(n))} for n in (8, 3, 5)]
    masked = [row | {"think_mask": [0, 1] * 4} for row in rows[:1]]
    model = thinking_model(talk_length=2)
    assert model.count_items(**collate(rows)).tolist() == [7 + 2 + 4, 7 + 2 + 4, 6 + 1 + 3, 5 + 0 + 2]
    assert model.count_items(**collate(masked)).tolist() == [7, 3, 3, 2]
    whole = {name: x[:, :-1] for name, x in collate(rows).items()}
    assert model.count_items(whole["input_ids"]).tolist() == [18, 18, 15, 12]
