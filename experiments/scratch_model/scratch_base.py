"""The base model: a Llama of half a million parameters, trained from scratch on all kinds of text at once.

As the embedded model of the demo, it first reads asides that all show the steps, in every document; then
asides become rare, and most of them are of no use.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from experiments.scratch_model.kinds import KINDS, Question, document
from experiments.scratch_model.muon import Muon
from qstar.data import collate
from qstar.demo.make_tiny_lm import byte_level_bpe

PROSE = Path(__file__).with_name("prose.txt")
VOCABULARY, WIDTH, LAYERS, HEADS, MLP, CONTEXT = 1024, 128, 2, 4, 256, 256
TOKENIZER_DOCUMENTS = 6_000  # of each kind, so that every word of an aside becomes one token


@dataclass(frozen=True)
class BaseRecipe:
    """How the base model is trained. In the first `common_share` of the steps every document has a useful
    aside; after that `rare_asides` of them have one, and `useful_share` of these are useful."""

    steps: int = 500
    common_share: float = 0.6
    rows: int = 20
    tokens: int = 80
    prose_share: float = 0.15
    rare_asides: float = 0.5
    useful_share: float = 0.2
    muon_learning_rate: float = 0.02  # of the layers' matrices
    learning_rate: float = 4e-3  # of the rest, with AdamW; both rise in `warmup` steps
    warmup: int = 40
    decay_share: float = 0.4  # of the steps, at the end, in which they fall to zero


@dataclass(frozen=True)
class Prose:
    """State of the Union addresses: what the base model reads; what Quiet-STaR and the control read, of which
    the base knows nothing by heart; and what is tested."""

    base: str
    later: str
    held_out: str


def prose() -> Prose:
    *base, held_out, first, second = PROSE.read_text(encoding="utf-8").strip().split("\n")
    return Prose("\n".join(base), f"{first}\n{second}", held_out)


@cache
def make_tokenizer() -> PreTrainedTokenizerBase:
    """The same for every seed, so that a NLL a token means the same."""
    texts = [prose().base, "—"]
    for kind in KINDS.values():
        draw = random.Random(f"tokenizer {kind.name}")
        texts += [document(kind, draw, 1.0, 0.5) for _ in range(TOKENIZER_DOCUMENTS)]
    return byte_level_bpe(texts, VOCABULARY)


def batches(recipe: BaseRecipe, tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[dict[str, Tensor]]:
    """input_ids, position_ids, labels [rows, tokens] int64: rows of prose, and rows of whole documents, none
    of which sees another."""
    draw = random.Random(f"base {seed}")
    ids = tokenizer(prose().base, verbose=False)["input_ids"]
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


def new_model(seed: int, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=MLP,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=None,
        )
    )


def train(recipe: BaseRecipe, tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """The base model of this seed."""
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

    schedules = [torch.optim.lr_scheduler.LambdaLR(x, rate) for x in optimizers]
    progress = tqdm(batches(recipe, tokenizer, seed), total=recipe.steps, desc=f"base model, seed {seed}")
    for step, batch in enumerate(progress):
        loss = model(**batch, use_cache=False).loss  # with a cache, documents would see each other
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{float(loss.detach()):.3f}")
    return model.eval()


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
