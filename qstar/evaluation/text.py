"""Score plain text: NLL of every token and of the hardest tenth, with the controls that a reader needs.

The hardest tokens are chosen by the NLL of one model, so whatever flattens a prediction makes them likelier:
a softmax temperature of 1.05 alone does (docs/evaluation.md). So that model at other temperatures is a
condition beside the control and shuffled thoughts, and each figure of the hard tokens has that of all tokens
next to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from qstar_kernels.vocabulary import LinearHead, nll_by_temperature

from qstar.data import encode, pack_rows
from qstar.evaluation.held_out import hardest
from qstar.evaluation.predictions import ALONE, WAYS, Predictions
from qstar.evaluation.run import Figures, RowTask
from qstar.evaluation.statistics import Sums

SMOOTHED = "smoothed"  # the way of the model that says which tokens are hard, at every temperature
TEMPERATURES = (0.7, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2, 1.3, 1.4, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
SHOWN = (1.05, 1.1, 1.2)
DIGITS = 6  # of a NLL in the file


@dataclass(frozen=True)
class Span:
    """A row of tokens of one text; at: the positions whose next token is scored; cluster: the number of its
    text, or of the span itself when there is only one text."""

    input_ids: list[int]
    at: list[int]
    cluster: int


def spans(
    texts: Sequence[str], tokenizer: Any, span_length: int, tokens_per_span: int | None = None, seed: int = 0
) -> list[Span]:
    """Cut texts into spans of at most span_length tokens, of which every token but the first is scored, or
    tokens_per_span of them, drawn at random. Raises ValueError for a size out of range, and for a text that
    holds nothing to score."""
    least = {"span_length": (span_length, 2), "tokens_per_span": (tokens_per_span, 1)}
    for name, (value, smallest) in least.items():
        if value is not None and value < smallest:
            raise ValueError(f"{name} = {value}: must be at least {smallest}")
    found: list[Span] = []
    for number, ids in enumerate(encode(list(texts), tokenizer)):
        for row in pack_rows(iter([ids]), span_length)["input_ids"]:
            at = torch.arange(len(row) - 1)
            if tokens_per_span is not None:
                source = torch.Generator().manual_seed(seed * 1_000_003 + len(found))
                at = torch.randperm(len(at), generator=source)[:tokens_per_span].sort().values
            found.append(Span(row, at.tolist(), len(found) if len(texts) == 1 else number))
    return found


class PlainText(RowTask):
    """Items of `Span`; the figures of a span are nll, one for each scored token, and weight, the mean w. The
    way SMOOTHED has only nll: for each token a list of one for each of TEMPERATURES."""

    ways = (*WAYS, ALONE, SMOOTHED)
    predicted_by: ClassVar = {SMOOTHED: "without"}

    def figures(
        self, way: str, items: Sequence[Span], predictions: Predictions, head: LinearHead
    ) -> list[Figures]:
        following = [item.input_ids[t + 1] for item in items for t in item.at]
        targets = torch.tensor(following, device=predictions.base.device)
        sizes = [len(item.at) for item in items]
        if way == SMOOTHED:
            temperatures = torch.tensor(TEMPERATURES, dtype=torch.float64)
            smooth = nll_by_temperature(predictions.base, head, targets, temperatures)
            return [{"nll": _rounded(x)} for x in smooth.cpu().split(sizes)]
        nll = predictions.nll(head, targets).cpu().split(sizes)
        weight = torch.zeros(len(targets)) if predictions.weight is None else predictions.weight.cpu()
        return [
            {"nll": _rounded(x), "weight": round(float(w.mean()), DIGITS)}
            for x, w in zip(nll, weight.split(sizes))
        ]


def _rounded(values: torch.Tensor) -> list:
    return np.round(values.double().numpy(), DIGITS).tolist()


@dataclass(frozen=True)
class Measured:
    """The NLL of all tokens and of the hard ones, and the mean w, by condition in the order of the tables;
    best: the temperatures that make the reference best on all tokens and on the hard ones."""

    all: dict[str, Sums]
    hard: dict[str, Sums]
    weight: dict[str, float]
    best: dict[str, float]


def measured(
    chosen: Sequence[Span], figures: dict[str, list[Figures]], smoothed: list[Figures], reference: str
) -> Measured:
    """Collect the figures of the chosen spans by condition.

    figures: by condition; the NLL of the condition `reference` says which tokens are hard. smoothed: the
    figures in the way SMOOTHED of the reference's model, which become conditions after it.
    """
    cluster = np.repeat([span.cluster for span in chosen], [len(span.at) for span in chosen])
    _, cluster = np.unique(cluster, return_inverse=True)
    nll = {name: np.concatenate([np.asarray(x["nll"]) for x in rows]) for name, rows in figures.items()}
    weight = {
        name: float(np.average([x["weight"] for x in rows], weights=[len(x["nll"]) for x in rows]))
        for name, rows in figures.items()
    }
    hard = hardest(torch.from_numpy(nll[reference])).numpy()
    curve = np.concatenate([np.asarray(x["nll"]) for x in smoothed])  # [tokens, temperatures]
    best = {
        "all": TEMPERATURES[int(curve.mean(0).argmin())],
        "hard": TEMPERATURES[int(curve[hard].mean(0).argmin())],
    }
    ordered: dict[str, np.ndarray] = {}
    for name, values in nll.items():
        ordered[name] = values
        for temperature in sorted({*SHOWN, *best.values()}) if name == reference else ():
            roles = ", ".join(f"best for {which}" for which, value in best.items() if value == temperature)
            smooth = f"{name}, T = {temperature:g}" + (f" ({roles})" if roles else "")
            ordered[smooth] = curve[:, TEMPERATURES.index(temperature)]
    return Measured(
        all={name: Sums.by_cluster(values, cluster) for name, values in ordered.items()},
        hard={name: Sums.by_cluster(values, cluster, hard) for name, values in ordered.items()},
        weight=weight,
        best=best,
    )
