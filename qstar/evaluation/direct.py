"""Zero-shot, direct: how likely is the right answer right after the question?

soft: the product over the answer's scored tokens of their teacher-forced probability, each renormalised over
the fixed set; argmax: whether each of them is the likeliest of the set. A thought is taken at every position
that predicts such a token, as in training. Source: arXiv 2403.09629, section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qstar.evaluation.predictions import WAYS, Thinking, evaluated, padded, predict
from qstar.evaluation.questions import Item
from qstar.evaluation.run import Figures
from qstar.model import QuietStarForCausalLM


@dataclass(frozen=True)
class DirectAnswers:
    """A `run.Task`; the figures of a question are soft and argmax, 0 or 1."""

    items: Sequence[Item]
    ways = WAYS
    metrics = ("soft", "argmax")

    @property
    def lengths(self) -> list[int]:
        return [len(item.input_ids) for item in self.items]

    def check(self, model: QuietStarForCausalLM) -> None:
        model.check_length(max(self.lengths), "the longest question", evaluated(model.quiet_star))

    def score(
        self,
        model: QuietStarForCausalLM,
        questions: list[int],
        ways: tuple[str, ...],
        thinking: Thinking,
        generator: torch.Generator,
    ) -> dict[str, list[Figures]]:
        items = [self.items[i] for i in questions]
        device = model.boundary.start_raw.device
        batch, at = padded([(item.input_ids, item.at) for item in items], device)
        found = predict(model, batch, at, ways, thinking, generator)
        sets = {item.allowed: torch.tensor(item.allowed, device=device) for item in items}
        heads = {allowed: model.linear_head().only(ids) for allowed, ids in sets.items()}
        figures: dict[str, list[Figures]] = {way: [] for way in ways}
        for way, predictions in found.items():
            first = 0
            for item in items:
                rows = slice(first, first + len(item.at))
                first = rows.stop
                targets = torch.tensor(item.targets, device=device)
                log_p = predictions.logits(heads[item.allowed], rows).log_softmax(-1)
                right = log_p.gather(1, targets[:, None]).double().sum().exp()
                hit = bool((log_p.argmax(-1) == targets).all())
                figures[way].append({"soft": float(right), "argmax": int(hit)})
        return figures
