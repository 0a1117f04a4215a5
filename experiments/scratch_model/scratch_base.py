"""Make the base model: a Llama of half a million parameters, trained on all kinds of text at once.

Like the embedded model of the demo, it first reads asides in every document that all show the steps; then
asides become rare, and most of them are of no use.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from experiments.scratch_model.kinds import KINDS, BuiltQuestion, document
from experiments.scratch_model.muon import Muon
from experiments.shared.small_llama import aside_batches, byte_level_bpe, new_llama, pretrain
from qstar.data import collate

PROSE = Path(__file__).with_name("prose.txt")
VOCABULARY = 1024
TOKENIZER_DOCUMENTS = 6_000  # of each kind, so that every word of an aside becomes one token


@dataclass(frozen=True)
class BaseRecipe:
    """How the base model is trained. In the first `common_share` of the steps every document has a useful
    aside; after that half of them have an aside, and `useful_share` of these are useful."""

    steps: int = 500
    common_share: float = 0.6
    rows: int = 20
    tokens: int = 80
    prose_share: float = 0.15
    useful_share: float = 0.2
    muon_learning_rate: float = 0.02  # of the layers' matrices
    learning_rate: float = 4e-3  # of the rest, with AdamW; both rise in `warmup` steps
    warmup: int = 40
    decay_share: float = 0.4  # of the steps, at the end, in which they fall to zero


@dataclass(frozen=True)
class Prose:
    """State of the Union addresses that the base model reads, that Quiet-STaR and the control read later (the
    base knows nothing of them by heart), and that are held out for the tests."""

    base: str
    later: str
    held_out: str


def prose() -> Prose:
    *base, held_out, first, second = PROSE.read_text(encoding="utf-8").strip().split("\n")
    return Prose("\n".join(base), f"{first}\n{second}", held_out)


@cache
def make_tokenizer() -> PreTrainedTokenizerBase:
    """Make the tokenizer, the same for every seed, so that an NLL a token means the same."""
    texts = [prose().base, "—"]
    for kind in KINDS.values():
        draw = random.Random(f"tokenizer {kind.name}")
        texts += [document(kind, draw, 1.0, 0.5) for _ in range(TOKENIZER_DOCUMENTS)]
    return byte_level_bpe(texts, VOCABULARY)


def batches(recipe: BaseRecipe, tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[dict[str, Tensor]]:
    """Yield input_ids, position_ids, labels [rows, tokens] int64 of every step: prose, and documents of
    random kinds, none of which sees another."""
    draw = random.Random(f"base {seed}")

    def question(asides: float, useful: float) -> list[int]:
        kind = KINDS[draw.choice(list(KINDS))]
        return tokenizer(document(kind, draw, asides, useful))["input_ids"] + [tokenizer.eos_token_id]

    words = tokenizer(prose().base, verbose=False)["input_ids"]
    for rows in aside_batches(
        draw,
        words,
        question,
        steps=recipe.steps,
        common_steps=recipe.common_share * recipe.steps,
        rows=recipe.rows,
        tokens=recipe.tokens,
        prose_share=recipe.prose_share,
        useful_share=recipe.useful_share,
    ):
        batch = collate(rows)
        del batch["attention_mask"]  # the model tells documents apart by their position_ids
        yield batch


def new_model(seed: int, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    return new_llama(
        seed,
        tokenizer,
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )


def train(recipe: BaseRecipe, tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """Train the base model of a seed."""
    model = new_model(seed, tokenizer).train()
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = set(matrices)
    others = [p for p in model.parameters() if p not in chosen]
    optimizers = [
        Muon(matrices, lr=recipe.muon_learning_rate),
        torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]

    def rate(step: int) -> float:
        left = (recipe.steps - step) / (recipe.decay_share * recipe.steps)
        return min(1.0, (step + 1) / recipe.warmup, left)

    with_schedules = [(x, torch.optim.lr_scheduler.LambdaLR(x, rate)) for x in optimizers]
    label = f"base model, seed {seed}"
    return pretrain(model, batches(recipe, tokenizer, seed), recipe.steps, with_schedules, label).eval()


@torch.no_grad()
def told_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, kind: str, questions: list[BuiltQuestion]
) -> float:
    """Return the share of questions whose answer is the likeliest of its kind after the useful aside, written
    out: what a thought could reach."""
    ids = torch.tensor(tokenizer([q.document(q.useful_aside) for q in questions])["input_ids"])
    words = torch.tensor(tokenizer([f" {answer}" for answer in KINDS[kind].answers])["input_ids"])[:, 0]
    said = words[model(input_ids=ids).logits[:, -3, words].argmax(-1)]  # then the answer and its full stop
    return float((said == ids[:, -2]).float().mean())
