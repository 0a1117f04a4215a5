"""Train Quiet-STaR and the control on text without asides, and test both on unseen text."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from experiments.scratch_model.kinds import KINDS, BuiltQuestion
from experiments.scratch_model.scratch_base import prose
from qstar.base_model import in_eval_mode
from qstar.config import QuietStarConfig
from qstar.data import encode
from qstar.demo import walk_training as demo
from qstar.evaluation.held_out import hardest
from qstar.evaluation.predictions import ThoughtSampling, padded, predict
from qstar.evaluation.text import Span, spans
from qstar.model import QuietStarForCausalLM

PROSE = "prose"
WAYS = ("without", "thoughts", "shuffled")  # of a model that thinks; a plain one has only the first
POLICY_WEIGHT = 5.0
BATCH = 32  # rows of a test's batch; thoughts are shuffled within it


@dataclass(frozen=True)
class TrainingRecipe:
    """How every condition trains on from the base model; kinds: those whose text it sees, each as often as
    the others and as prose, in spans of prose_tokens."""

    steps: int = 160
    kinds: tuple[str, ...] = ("walks", "sums", "sorting")
    prose_tokens: int = 24


def thinking() -> QuietStarConfig:
    """Return the demo's settings of the method, with one thought a position."""
    return replace(demo.thinking(policy_weight=POLICY_WEIGHT), num_thoughts=1)


def training_rows(recipe: TrainingRecipe, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[dict]:
    """Draw rows of one document each, of every kind in turn and without asides, and of spans of prose."""
    draw = random.Random(f"train {seed}")
    words = tokenizer(prose().later, verbose=False)["input_ids"]
    turns = [*recipe.kinds, PROSE]
    rows = []
    for i in range(recipe.steps * demo.BATCH):
        name = turns[i % len(turns)]
        if name == PROSE:
            first = draw.randrange(len(words) - recipe.prose_tokens)
            ids = words[first : first + recipe.prose_tokens]
        else:
            (ids,) = encode([KINDS[name].question(draw).document()], tokenizer)
        rows.append({"input_ids": ids, "position_ids": list(range(len(ids)))})
    return rows


def thinker(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> QuietStarForCausalLM:
    """Wrap the base model as one that has not learned to think yet: w = 0."""
    return QuietStarForCausalLM.from_base(base, thinking(), tokenizer=tokenizer).eval()


def train(
    base: PreTrainedModel, recipe: TrainingRecipe, tokenizer: PreTrainedTokenizerBase, seed: int, thinks: bool
) -> PreTrainedModel:
    """Train the base model on the same rows in the same order, with thoughts or without (the control)."""
    set_seed(seed)
    model = thinker(base, tokenizer) if thinks else base
    return demo.fit_rows(model, training_rows(recipe, tokenizer, seed), seed)


@dataclass(frozen=True)
class Unseen:
    """The tests of one kind: spans of unseen text whose tokens are scored, and questions (of prose none).
    words: the token ids of all answers that the kind has."""

    kind: str
    tokenizer: PreTrainedTokenizerBase
    spans: list[Span]
    questions: list[BuiltQuestion]
    words: list[int]

    @classmethod
    def make(cls, kind: str, tokenizer: PreTrainedTokenizerBase, questions: int, texts: int) -> Unseen:
        """Make the tests, the same for every seed; texts: documents of the first questions, or spans of 64
        tokens of prose. Raises ValueError for more spans than the prose has."""
        if kind == PROSE:
            found = spans([prose().held_out], tokenizer, 64)
            if not 1 <= texts <= len(found):
                raise ValueError(f"texts = {texts}: must be in [1, {len(found)}]")
            return cls(kind, tokenizer, found[:texts], [], [])
        asked = KINDS[kind].questions(questions, "test", held_out=True)
        documents = [question.document() for question in asked[:texts]]
        words = [ids[0] for ids in tokenizer([f" {answer}" for answer in KINDS[kind].answers])["input_ids"]]
        return cls(kind, tokenizer, spans(documents, tokenizer, 64), asked, words)

    @property
    def ends(self) -> list[tuple[list[int], list[int]]]:
        """The questions as token ids, and the position of each one's last token."""
        texts = [question.text for question in self.questions]
        return [(ids, [len(ids) - 1]) for ids in self.tokenizer(texts)["input_ids"]]


def hard(base: QuietStarForCausalLM, test: Unseen) -> list[Tensor]:
    """Mark, in [tokens] bool of every span, the tenth of all tokens that the base model finds hardest."""
    nll = [x["nll"] for x in text_scores(base, test, ("without",), seed=0)["without"]]
    return list(hardest(torch.cat(nll)).split([len(x) for x in nll]))


def text_scores(
    model: QuietStarForCausalLM, test: Unseen, ways: tuple[str, ...], seed: int
) -> dict[str, list[dict[str, Tensor]]]:
    """Score every token of the spans, by way, with a greedy thought at every position: nll [tokens] in nats,
    and top [tokens] bool, whether the likeliest token was right."""
    found: dict[str, list[dict[str, Tensor]]] = {way: [] for way in ways}
    asked = [(span.input_ids, span.at) for span in test.spans]
    for batch, at, predictions in _predicted(model, asked, ways, seed):
        targets = batch["input_ids"].roll(-1, dims=1)[at]
        sizes = at.sum(1).tolist()
        for way in ways:
            nll = predictions[way].nll(model.linear_head(), targets).split(sizes)
            top = (predictions[way].logits(model.linear_head()).argmax(-1) == targets).split(sizes)
            found[way] += [{"nll": a, "top": b} for a, b in zip(nll, top)]
    return found


def answers(
    model: QuietStarForCausalLM, test: Unseen, ways: tuple[str, ...], seed: int
) -> dict[str, list[int]]:
    """Return, by way, 1 for every question whose answer is the likeliest word of its kind, else 0: right
    after the question or after a greedy thought."""
    right = [list(KINDS[test.kind].answers).index(question.answer) for question in test.questions]
    said: dict[str, list[int]] = {way: [] for way in ways}
    for _, _, predictions in _predicted(model, test.ends, ways, seed):
        for way in ways:
            said[way] += predictions[way].logits(model.linear_head())[:, test.words].argmax(-1).tolist()
    return {way: [int(a == b) for a, b in zip(found, right)] for way, found in said.items()}


def useful_share(model: QuietStarForCausalLM, test: Unseen, seed: int) -> float:
    """Return the share of thoughts, sampled at the end of the questions, that are the useful aside."""
    sampled = ThoughtSampling(temperature=1.0)
    predicted = _predicted(model, test.ends, ("thoughts",), seed, sampled)
    thoughts = torch.cat([x["thoughts"].tokens for *_, x in predicted])
    useful = torch.tensor(test.tokenizer([f" {q.useful_aside}" for q in test.questions])["input_ids"])
    return float((thoughts == useful).all(-1).float().mean())


def _predicted(
    model: QuietStarForCausalLM,
    asked: list[tuple[list[int], list[int]]],
    ways: tuple[str, ...],
    seed: int,
    how: ThoughtSampling | None = None,
) -> Iterable[tuple[dict[str, Tensor], Tensor, dict[str, Any]]]:
    source = torch.Generator().manual_seed(seed)
    # batches are as even as can be: a thought alone in its batch cannot be shuffled
    parts = max(1, round(len(asked) / BATCH))
    bounds = [i * len(asked) // parts for i in range(parts + 1)]
    with in_eval_mode(model):
        for first, last in pairwise(bounds):
            batch, at = padded(asked[first:last], model.boundary.start_raw.device)
            yield batch, at, predict(model, batch, at, ways, how, source)


def measure(
    model: QuietStarForCausalLM, test: Unseen, chosen: list[Tensor], ways: tuple[str, ...], seed: int
) -> dict[str, dict[str, list]]:
    """Return the sums of every cluster (a question, of prose a span), by way: correct of asked (of prose,
    every token); nll of tokens; hard_nll of hard tokens, those that `chosen` marks."""
    text = text_scores(model, test, ways, seed)
    said = answers(model, test, ways, seed) if test.questions else {}
    found: dict[str, dict[str, list]] = {}
    for way in ways:
        rows = text[way]
        correct = said.get(way) or [int(x["top"].sum()) for x in rows]
        found[way] = {
            "correct": correct,
            "asked": [1] * len(correct) if test.questions else [len(x["top"]) for x in rows],
            "nll": [round(float(x["nll"].sum()), 5) for x in rows],
            "tokens": [len(x["nll"]) for x in rows],
            "hard_nll": [round(float(x["nll"][at].sum()), 5) for x, at in zip(rows, chosen)],
            "hard": [int(at.sum()) for at in chosen],
        }
    return found
