"""Plain text: NLL of every token and of the hardest tenth, with what keeps a reader from being fooled by it.

The hardest tokens are chosen by the NLL of one model, so whatever flattens a prediction makes them likelier:
a softmax temperature of 1.05 alone does (docs/evaluation.md). So that model at other temperatures is a
condition beside the control and shuffled thoughts, and each figure of the hard tokens has that of all tokens
next to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from qstar_kernels.vocabulary import nll_by_temperature

from qstar.data import encode, pack_rows
from qstar.evaluation.held_out import hardest
from qstar.evaluation.predictions import ALONE, WAYS, Thinking, evaluated, padded, predict
from qstar.evaluation.run import Figures
from qstar.evaluation.statistics import Sums
from qstar.model import QuietStarForCausalLM

SMOOTHED = "smoothed"  # the way of the model that says which tokens are hard, at every temperature
TEMPERATURES = (0.7, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2, 1.3, 1.4, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
SHOWN = (1.05, 1.1, 1.2)
DIGITS = 6  # of a NLL in the file


@dataclass(frozen=True)
class Span:
    """A row of tokens of one text; at: the positions whose next token is scored; cluster: its text, or, where
    there is one text only, itself."""

    input_ids: list[int]
    at: list[int]
    cluster: int


def spans(
    texts: Sequence[str], tokenizer: Any, span_length: int, tokens_per_span: int | None = None, seed: int = 0
) -> list[Span]:
    """Texts cut into spans of at most span_length tokens, of which every token but the first is scored, or
    tokens_per_span of them, drawn at random. Raises ValueError for sizes out of range and texts that hold
    nothing to score."""
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


@dataclass(frozen=True)
class PlainText:
    """A `run.Task`; the figures of a span are nll, one of each scored token, and weight, the mean w; of the
    way SMOOTHED nll, a list of one for each of TEMPERATURES of each token."""

    spans: Sequence[Span]
    ways = (*WAYS, ALONE, SMOOTHED)

    @property
    def lengths(self) -> list[int]:
        return [len(span.input_ids) for span in self.spans]

    def check(self, model: QuietStarForCausalLM) -> None:
        model.check_length(max(self.lengths), "the longest span", evaluated(model.quiet_star))

    def score(
        self,
        model: QuietStarForCausalLM,
        questions: list[int],
        ways: tuple[str, ...],
        thinking: Thinking,
        generator: torch.Generator,
    ) -> dict[str, list[Figures]]:
        chosen = [self.spans[i] for i in questions]
        asked_for = [(span.input_ids, span.at) for span in chosen]
        batch, at = padded(asked_for, model.boundary.start_raw.device)
        targets = batch["input_ids"].roll(-1, dims=1)[at]
        asked = tuple(way for way in ways if way != SMOOTHED)
        found = predict(model, batch, at, ("without", *asked), thinking, generator)
        sizes = [len(span.at) for span in chosen]
        figures: dict[str, list[Figures]] = {}
        for way in asked:
            predictions = found[way]
            each = predictions.nll(model.linear_head(), targets).cpu().split(sizes)
            weight = torch.zeros(len(targets)) if predictions.weight is None else predictions.weight.cpu()
            figures[way] = [
                {"nll": _rounded(nll), "weight": round(float(w.mean()), DIGITS)}
                for nll, w in zip(each, weight.split(sizes))
            ]
        if SMOOTHED in ways:
            temperatures = torch.tensor(TEMPERATURES, dtype=torch.float64)
            smooth = nll_by_temperature(found["without"].base, model.linear_head(), targets, temperatures)
            figures[SMOOTHED] = [{"nll": _rounded(x)} for x in smooth.cpu().split(sizes)]
        return figures


def _rounded(values: torch.Tensor) -> list:
    return np.round(values.double().numpy(), DIGITS).tolist()


@dataclass(frozen=True)
class Measured:
    """by condition, in the order of the tables: NLL of all tokens, of the hard ones, and the mean w; best:
    the temperatures that make the reference best on all tokens and on the hard ones."""

    all: dict[str, Sums]
    hard: dict[str, Sums]
    weight: dict[str, float]
    best: dict[str, float]


def measured(
    chosen: Sequence[Span], figures: dict[str, list[Figures]], smoothed: list[Figures], reference: str
) -> Measured:
    """figures: of the spans, by condition, among them the reference, whose NLL says which tokens are hard;
    smoothed: those of the way SMOOTHED of its model, which become conditions after it."""
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
        if name == reference:
            for temperature in sorted({*SHOWN, *best.values()}):
                at = TEMPERATURES.index(temperature)
                ordered[smoothed_name(reference, temperature, best)] = curve[:, at]
    return Measured(
        all={name: Sums.by_cluster(values, cluster) for name, values in ordered.items()},
        hard={name: Sums.by_cluster(values, cluster, hard) for name, values in ordered.items()},
        weight=weight,
        best=best,
    )


def smoothed_name(reference: str, temperature: float, best: dict[str, float]) -> str:
    roles = [f"best for {which}" for which, value in best.items() if value == temperature]
    return f"{reference}, T = {temperature:g}" + (f" ({', '.join(roles)})" if roles else "")
