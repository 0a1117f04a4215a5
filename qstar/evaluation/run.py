"""Run an evaluation: models in turn, each in its conditions, over the batches of a task.

A batch of a model is read once for all its conditions. Its random numbers follow from the seed and the batch
alone, so a resumed run measures what an uninterrupted one would have measured.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from qstar_kernels.vocabulary import LinearHead
from tqdm.auto import tqdm

from qstar.base_model import in_eval_mode
from qstar.evaluation.predictions import Predictions, ThoughtSampling, evaluated, padded, predict
from qstar.evaluation.results import Results
from qstar.model import QuietStarForCausalLM

Figures = dict[str, Any]  # of one question in one condition, ready for JSON


class Task(ABC):
    """Questions and how to score them; ways: those that can be scored."""

    ways: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def lengths(self) -> list[int]:
        """Tokens of each question."""

    @abstractmethod
    def check(self, model: QuietStarForCausalLM) -> None:
        """Raise ValueError if a question does not fit the model's context."""

    @abstractmethod
    def score(
        self,
        model: QuietStarForCausalLM,
        questions: list[int],
        ways: tuple[str, ...],
        thinking: ThoughtSampling,
        generator: torch.Generator,
    ) -> dict[str, list[Figures]]:
        """Return the figures of the questions with these numbers, by way."""


@dataclass(frozen=True)
class RowTask(Task):
    """A task whose questions are rows of tokens, items (input_ids, at), scored by the predictions after the
    positions `at`; predicted_by: the way whose predictions another way is scored from."""

    items: Sequence[Any]
    predicted_by: ClassVar[dict[str, str]] = {}

    @property
    def lengths(self) -> list[int]:
        return [len(item.input_ids) for item in self.items]

    def check(self, model: QuietStarForCausalLM) -> None:
        model.check_length(max(self.lengths), "the longest row", evaluated(model.quiet_star))

    def score(self, model, questions, ways, thinking, generator) -> dict[str, list[Figures]]:
        items = [self.items[i] for i in questions]
        batch, at = padded([(item.input_ids, item.at) for item in items], model.device)
        sources = {way: self.predicted_by.get(way, way) for way in ways}
        found = predict(model, batch, at, tuple(sources.values()), thinking, generator)
        return {
            way: self.figures(way, items, found[source], model.linear_head())
            for way, source in sources.items()
        }

    @abstractmethod
    def figures(
        self, way: str, items: Sequence[Any], predictions: Predictions, head: LinearHead
    ) -> list[Figures]:
        """Return the figures of each item; predictions: those of all items, one after the other."""


@dataclass(frozen=True)
class Contestant:
    """A model, opened when its turn comes, and the names of its conditions by way; plain: it never learned to
    think, so only its base model is its own."""

    name: str
    open: Callable[[], QuietStarForCausalLM]
    conditions: dict[str, str]
    plain: bool = False


def batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Split the numbers of the questions, longest first, into batches whose sizes differ by at most one."""
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
    thinking: ThoughtSampling | None = None,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Add to the results what is missing there."""
    thinking = thinking or ThoughtSampling()
    all_batches = batches(task.lengths, batch_size)
    for contestant in contestants:
        model, conditions = contestant.open(), contestant.conditions
        results.begin(contestant.name, model.base if contestant.plain else model)
        task.check(model)
        waiting = [
            (number, batch)
            for number, batch in enumerate(all_batches)
            if not all(results.has(condition, i) for condition in conditions.values() for i in batch)
        ]
        done = len(task.lengths) - sum(len(batch) for _, batch in waiting)
        bar = tqdm(total=len(task.lengths), initial=done, desc=contestant.name, disable=not progress)
        with in_eval_mode(model), bar:
            for number, batch in waiting:
                source = torch.Generator().manual_seed(seed * 1_000_003 + number)
                found = task.score(model, batch, tuple(conditions), thinking, source)
                for way, condition in conditions.items():
                    for i, figures in zip(batch, found[way]):
                        results.add(condition, i, figures)
                bar.update(len(batch))
        del model  # before the next is opened
