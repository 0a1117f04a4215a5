"""Score zero-shot direct answers: how likely is the right answer right after the question?

soft: the product over the answer's scored tokens of their teacher-forced probability, each renormalised over
the fixed set; argmax: whether each of them is the likeliest of the set. A thought is taken at every position
that predicts such a token, as in training. Source: arXiv 2403.09629, section 5.
"""

from collections.abc import Sequence

import torch
from qstar_kernels.vocabulary import LinearHead

from qstar.evaluation.predictions import WAYS, Predictions
from qstar.evaluation.questions import Item
from qstar.evaluation.run import Figures, RowTask


class DirectAnswers(RowTask):
    """Items of `questions.Item`; the figures of a question are soft and argmax, 0 or 1."""

    ways = WAYS
    metrics = ("soft", "argmax")

    def figures(
        self, way: str, items: Sequence[Item], predictions: Predictions, head: LinearHead
    ) -> list[Figures]:
        device = predictions.base.device
        sets = {item.allowed: torch.tensor(item.allowed, device=device) for item in items}
        heads = {allowed: head.only(ids) for allowed, ids in sets.items()}
        found: list[Figures] = []
        first = 0
        for item in items:
            rows = slice(first, first + len(item.at))
            first = rows.stop
            targets = torch.tensor(item.targets, device=device)
            log_p = predictions.logits(heads[item.allowed], rows).log_softmax(-1)
            right = log_p.gather(1, targets[:, None]).double().sum().exp()
            hit = bool((log_p.argmax(-1) == targets).all())
            found.append({"soft": float(right), "argmax": int(hit)})
        return found
