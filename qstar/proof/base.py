"""The base model: a Llama of about one million parameters, trained from scratch on all kinds of text at once.

As the embedded model of the demo, it first reads asides that all show the steps, in every document; then
asides become rare, and most of them are of no use.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from qstar.data import collate
from qstar.demo.make_tiny_lm import byte_level_bpe, new_model, one_cycle
from qstar.proof.kinds import KINDS, Question, document

PROSE = Path(__file__).with_name("prose.txt")
TOKENIZER_DOCUMENTS = 6_000  # of each kind, so that every word of an aside becomes one token


@dataclass(frozen=True)
class BaseRecipe:
    """How the base model is trained. In the first `common_share` of the steps every document has a useful
    aside; after that `rare_asides` of them have one, and `useful_share` of these are useful."""

    steps: int = 1200
    common_share: float = 0.65
    rows: int = 20
    tokens: int = 96
    prose_share: float = 0.2
    rare_asides: float = 0.5
    useful_share: float = 0.2
    learning_rate: float = 3e-3


def prose() -> tuple[str, str]:
    """(to train on, held out): nine State of the Union addresses, and the one after them."""
    *train, held_out = PROSE.read_text(encoding="utf-8").strip().split("\n")
    return "\n".join(train), held_out


def make_tokenizer() -> PreTrainedTokenizerBase:
    """The same for every seed, so that a NLL a token means the same."""
    texts = [prose()[0], "—"]
    for kind in KINDS.values():
        draw = random.Random(f"tokenizer {kind.name}")
        texts += [document(kind, draw, 1.0, 0.5) for _ in range(TOKENIZER_DOCUMENTS)]
    return byte_level_bpe(texts)


def batches(recipe: BaseRecipe, tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[dict[str, Tensor]]:
    """input_ids, position_ids, labels [rows, tokens] int64: rows of prose, and rows of whole documents, none
    of which sees another."""
    draw = random.Random(f"base {seed}")
    ids = tokenizer(prose()[0], verbose=False)["input_ids"]
    prose_rows = round(recipe.rows * recipe.prose_share)
    for step in range(recipe.steps):
        common = step < recipe.common_share * recipe.steps
        shares = (1.0, 1.0) if common else (recipe.rare_asides, recipe.useful_share)
        rows = []
        for row in range(recipe.rows):
            if row < prose_rows:
                first = draw.randrange(len(ids) - recipe.tokens)
                span = ids[first : first + recipe.tokens]
                rows.append({"input_ids": span, "position_ids": list(range(recipe.tokens))})
            else:
                rows.append(_row_of_documents(tokenizer, draw, shares, recipe.tokens))
        batch = collate(rows, recipe.tokens)
        del batch["attention_mask"]  # the model tells documents apart by their position_ids
        yield batch


def _row_of_documents(tokenizer, draw: random.Random, shares, tokens: int) -> dict[str, list[int]]:
    """Documents of random kinds; the last one is cut where the row ends."""
    ids: list[int] = []
    positions: list[int] = []
    while len(ids) < tokens:
        kind = KINDS[draw.choice(list(KINDS))]
        text = tokenizer(document(kind, draw, *shares))["input_ids"] + [tokenizer.eos_token_id]
        ids += text
        positions += range(len(text))
    return {"input_ids": ids[:tokens], "position_ids": positions[:tokens]}


def train(recipe: BaseRecipe, tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """The base model of this seed."""
    rows = batches(recipe, tokenizer, seed)
    return one_cycle(new_model(seed, tokenizer), rows, recipe.steps, recipe.learning_rate).eval()


@torch.no_grad()
def told_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, kind: str, questions: list[Question]
) -> float:
    """Share of the questions whose answer is the likeliest of its kind after the written-out useful aside:
    what a thought could reach."""
    ids = torch.tensor(tokenizer([q.document(q.useful_aside) for q in questions])["input_ids"])
    words = torch.tensor(tokenizer([f" {answer}" for answer in KINDS[kind].answers])["input_ids"])[:, 0]
    said = words[model(input_ids=ids).logits[:, -3, words].argmax(-1)]  # then the answer and its full stop
    return float((said == ids[:, -2]).float().mean())
