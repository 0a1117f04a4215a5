"""Train the embedded language model: first every document has a useful aside, then asides become rare."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from experiments.shared.small_llama import aside_batches, byte_level_bpe, new_llama, pretrain
from qstar.demo import TINY_LM
from qstar.demo.town import document

VOCABULARY = 2048


@dataclass
class TinyLmArguments:
    """Options of `python -m experiments.tiny_lm`."""

    prose: str = field(metadata={"help": "A text file of public-domain prose."})
    output: str = field(default=str(TINY_LM), metadata={"help": "Folder to write the model to."})
    seed: int = field(default=0, metadata={"help": "Seed of the weights and of the order of the text."})
    steps_common: int = field(default=800, metadata={"help": "Steps in which every aside is useful."})
    steps_rare: int = field(default=700, metadata={"help": "Steps in which only some asides are useful."})
    useful_share: float = field(default=0.2, metadata={"help": "Share of useful asides in these steps."})
    rows: int = field(default=32, metadata={"help": "Rows of a batch."})
    tokens: int = field(default=96, metadata={"help": "Tokens of a row."})
    prose_share: float = field(default=0.3, metadata={"help": "Share of the rows that are prose."})
    learning_rate: float = field(
        default=3e-3, metadata={"help": "Highest learning rate of AdamW, in one cycle."}
    )


def make_tokenizer(prose: str, seed: int) -> PreTrainedTokenizerBase:
    """Train the tokenizer on the prose and on walks with asides of both kinds."""
    draw = random.Random(f"tokenizer {seed}")
    walks = [document(draw, 1.0, 0.5) for _ in range(20_000)]
    return byte_level_bpe([prose, *walks, "—"], VOCABULARY)


def new_model(seed: int, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Build the random model, of about one million parameters."""
    return new_llama(
        seed,
        tokenizer,
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )


def batches(
    options: TinyLmArguments, tokenizer: PreTrainedTokenizerBase, prose: list[int]
) -> Iterator[Tensor]:
    """Yield token ids [rows, tokens] int64 of every step; the documents of a row see each other."""
    draw = random.Random(f"text {options.seed}")

    def walk(asides: float, useful: float) -> list[int]:
        return tokenizer(document(draw, asides, useful))["input_ids"] + [tokenizer.eos_token_id]

    for rows in aside_batches(
        draw,
        prose,
        walk,
        steps=options.steps_common + options.steps_rare,
        common_steps=options.steps_common,
        rows=options.rows,
        tokens=options.tokens,
        prose_share=options.prose_share,
        useful_share=options.useful_share,
    ):
        yield torch.tensor([row["input_ids"] for row in rows])


def train(
    model: LlamaForCausalLM, options: TinyLmArguments, tokenizer: PreTrainedTokenizerBase, prose: str
) -> LlamaForCausalLM:
    """Train a model in place, and return it."""
    steps = options.steps_common + options.steps_rare
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.learning_rate, total_steps=steps, pct_start=0.05
    )
    ids = tokenizer(prose, verbose=False)["input_ids"]
    labelled = ({"input_ids": batch, "labels": batch} for batch in batches(options, tokenizer, ids))
    return pretrain(model, labelled, steps, [(optimizer, schedule)], "language model")
