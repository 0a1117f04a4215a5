"""Make small Llamas and their tokenizers from scratch, on prose and on documents with asides."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

END_OF_TEXT = "<|endoftext|>"
LONGEST_TEXT = 512  # tokens; the tokenizer warns of longer ones


def byte_level_bpe(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of so many tokens on the texts; its first token is END_OF_TEXT."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=LONGEST_TEXT,
    )


def new_llama(seed: int, tokenizer: PreTrainedTokenizerBase, **sizes: Any) -> LlamaForCausalLM:
    """Build a random Llama; sizes: of its `LlamaConfig`."""
    torch.manual_seed(seed)
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**sizes, **ends))


def draw_rows(
    draw: random.Random,
    prose: list[int],
    document: Callable[[], list[int]],
    prose_rows: int,
    rows: int,
    tokens: int,
) -> list[dict[str, list[int]]]:
    """Draw input_ids and position_ids of rows: first spans of prose, then whole documents side by side.

    Positions count from 0 in every document; the last document of a row is cut where the row ends.
    """
    found = []
    for row in range(rows):
        ids: list[int] = []
        positions: list[int] = []
        if row < prose_rows:
            first = draw.randrange(len(prose) - tokens)
            ids, positions = prose[first : first + tokens], list(range(tokens))
        while len(ids) < tokens:
            text = document()
            ids += text
            positions += range(len(text))
        found.append({"input_ids": ids[:tokens], "position_ids": positions[:tokens]})
    return found


def pretrain(
    model: LlamaForCausalLM,
    batches: Iterable[dict[str, Tensor]],
    steps: int,
    optimizers: Sequence[tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]],
    label: str,
) -> LlamaForCausalLM:
    """Train a model in place, a step on each batch; gradients are clipped to norm 1."""
    progress = tqdm(batches, total=steps, desc=label)
    for step, batch in enumerate(progress):
        loss = model(**batch, use_cache=False).loss  # with a cache, documents of a row would see each other
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in optimizers:
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            progress.set_postfix(loss=f"{float(loss.detach()):.3f}")
    return model


def made_once(path: Path, make: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> Path:
    """Return the folder of a model, after making the model where there is no such folder yet.

    A run that is interrupted leaves no half-written folder behind.
    """
    if not path.is_dir():
        begun = path.with_name(f"{path.name}.begun")
        shutil.rmtree(begun, ignore_errors=True)
        make().save_pretrained(begun)
        tokenizer.save_pretrained(begun)
        begun.rename(path)
    return path


def digest(settings: Any) -> str:
    """Hash what JSON can hold to eight characters, for the name of a folder."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
