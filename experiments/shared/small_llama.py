"""Make small Llamas and their tokenizers from scratch, on prose and on documents with asides."""

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
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
RARE_ASIDES = 0.5  # share of documents with an aside once asides are rare
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


def aside_batches(
    draw: random.Random,
    prose: list[int],
    document: Callable[[float, float], list[int]],
    *,
    steps: int,
    common_steps: float,
    rows: int,
    tokens: int,
    prose_share: float,
    useful_share: float,
) -> Iterator[list[dict[str, list[int]]]]:
    """Draw the rows of every step, with input_ids and position_ids: spans of prose, and documents.

    For `common_steps` every document has a useful aside; then RARE_ASIDES of them have an aside, and
    `useful_share` of these a useful one. document: draws one with these two shares. Its positions count from
    0; the last one of a row is cut where the row ends.
    """
    for step in range(steps):
        shares = (1.0, 1.0) if step < common_steps else (RARE_ASIDES, useful_share)
        batch = []
        for row in range(rows):
            ids: list[int] = []
            positions: list[int] = []
            if row < round(rows * prose_share):
                first = draw.randrange(len(prose) - tokens)
                ids, positions = prose[first : first + tokens], list(range(tokens))
            while len(ids) < tokens:
                text = document(*shares)
                ids += text
                positions += range(len(text))
            batch.append({"input_ids": ids[:tokens], "position_ids": positions[:tokens]})
        yield batch


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
