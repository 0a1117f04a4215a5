"""An evaluation: models in turn, each in its conditions, over the batches of a task.

A batch of a model is read once for all its conditions. Its random numbers follow from seed and batch alone,
so a run that goes on where another stopped measures what that one would have measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from tqdm.auto import tqdm

from qstar.base_model import in_eval_mode
from qstar.evaluation.predictions import Thinking
from qstar.evaluation.results import Results
from qstar.model import QuietStarForCausalLM

Figures = dict[str, Any]  # of one question in one condition, ready for JSON


class Task(Protocol):
    """Questions, and how they are scored. lengths: tokens of each; ways: those that can be scored."""

    @property
    def lengths(self) -> list[int]: ...

    @property
    def ways(self) -> tuple[str, ...]: ...

    def check(self, model: QuietStarForCausalLM) -> None:
        """Raises ValueError where a question does not fit the model."""

    def score(
        self,
        model: QuietStarForCausalLM,
        questions: list[int],
        ways: tuple[str, ...],
        thinking: Thinking,
        generator: torch.Generator,
    ) -> dict[str, list[Figures]]:
        """The figures of these questions, by way."""


@dataclass(frozen=True)
class Contestant:
    """A model, opened when its turn comes, and the names of its conditions by way; plain: it never learned
    to think, what is not of its base model is there by chance."""

    name: str
    open: Callable[[], QuietStarForCausalLM]
    conditions: dict[str, str]
    plain: bool = False


def batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Numbers of questions, the longest first, in batches as even as can be: none is left over, alone."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    count = -(-len(order) // batch_size)
    borders = [len(order) * i // count for i in range(count + 1)]
    return [order[a:b] for a, b in pairwise(borders)]


@torch.no_grad()
def evaluate(
    task: Task,
    contestants: Sequence[Contestant],
    results: Results,
    batch_size: int = 8,
    thinking: Thinking | None = None,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Adds to the results what is missing there."""
    thinking = thinking or Thinking()
    all_batches = batches(task.lengths, batch_size)
    for contestant in contestants:
        model = contestant.open()
        results.begin(contestant.name, model.base if contestant.plain else model)
        task.check(model)
        conditions = contestant.conditions
        waiting = [
            (number, batch)
            for number, batch in enumerate(all_batches)
            if not all(results.has(condition, i) for condition in conditions.values() for i in batch)
        ]
        total = len(task.lengths)
        left = sum(len(batch) for _, batch in waiting)
        with (
            in_eval_mode(model),
            tqdm(total=total, initial=total - left, desc=contestant.name, disable=not progress) as bar,
        ):
            for number, batch in waiting:
                source = torch.Generator().manual_seed(seed * 1_000_003 + number)
                found = task.score(model, batch, tuple(conditions), thinking, source)
                for way, condition in conditions.items():
                    for i, figures in zip(batch, found[way]):
                        results.add(condition, i, figures)
                bar.update(len(batch))
        del model  # before the next is opened
