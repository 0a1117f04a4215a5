"""Makes the embedded language model: `python -m qstar.demo.make_tiny_lm --prose FILE`, about ten minutes on
two cores.

A byte-level BPE of 2,048 tokens and a Llama of about one million parameters, trained from a fixed seed on
prose and on walks (see town.py). It learns the useful asides while they are common; then they become rare:
half of the documents carry an aside, and one aside in five is useful.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qstar.demo import TINY_LM
from qstar.demo.town import document

END_OF_TEXT = "<|endoftext|>"
VOCABULARY, WIDTH, LAYERS, HEADS, KV_HEADS, MLP, CONTEXT = 2048, 128, 2, 4, 2, 512, 512
COMMON_ASIDES, RARE_ASIDES = 1.0, 0.5  # share of documents with an aside


@dataclass
class Options:
    """How the embedded model is made."""

    prose: str = field(metadata={"help": "A text file of public-domain prose."})
    output: str = field(default=str(TINY_LM), metadata={"help": "Folder to write the model to."})
    seed: int = field(default=0, metadata={"help": "Seed of the weights and of the order of the text."})
    steps_common: int = field(default=800, metadata={"help": "Steps while every aside is useful."})
    steps_rare: int = field(default=700, metadata={"help": "Steps while only some asides are."})
    useful_share: float = field(default=0.2, metadata={"help": "Share of useful asides in these steps."})
    rows: int = field(default=32, metadata={"help": "Rows of a batch."})
    tokens: int = field(default=96, metadata={"help": "Tokens of a row."})
    prose_share: float = field(default=0.3, metadata={"help": "Share of the tokens that is prose."})
    learning_rate: float = field(
        default=3e-3, metadata={"help": "Highest learning rate of AdamW, one cycle."}
    )


def make_tokenizer(prose: str, seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the prose and on as many walks with asides of both kinds."""
    draw = random.Random(f"tokenizer {seed}")
    walks = [document(draw, 1.0, 0.5) for _ in range(20_000)]
    return byte_level_bpe([prose, *walks, "—"], VOCABULARY)


def byte_level_bpe(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of so many tokens, trained on the texts; the first one is END_OF_TEXT."""
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
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, model_max_length=CONTEXT
    )


def batches(options: Options, tokenizer, prose: list[int]) -> Iterator[Tensor]:
    """[rows, tokens] int64: rows of prose and rows of walks; asides change from common to rare."""
    draw = random.Random(f"text {options.seed}")
    prose_rows = round(options.rows * options.prose_share)
    for step in range(options.steps_common + options.steps_rare):
        common = step < options.steps_common
        shares = (COMMON_ASIDES, 1.0) if common else (RARE_ASIDES, options.useful_share)
        batch = []
        for row in range(options.rows):
            if row < prose_rows:
                first = draw.randrange(len(prose) - options.tokens)
                batch.append(prose[first : first + options.tokens])
                continue
            ids: list[int] = []
            while len(ids) < options.tokens:
                ids += tokenizer(document(draw, *shares))["input_ids"] + [tokenizer.eos_token_id]
            batch.append(ids[: options.tokens])
        yield torch.tensor(batch)


def new_model(options: Options, tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(options.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=MLP,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=None,
        )
    )


def train(model: LlamaForCausalLM, options: Options, tokenizer, prose: str) -> LlamaForCausalLM:
    """The same model, after all steps."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.1
    )
    steps = options.steps_common + options.steps_rare
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.learning_rate, total_steps=steps, pct_start=0.05
    )
    ids = tokenizer(prose, verbose=False)["input_ids"]
    progress = tqdm(batches(options, tokenizer, ids), total=steps)
    for batch in progress:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if schedule.last_epoch % 20 == 0:
            progress.set_postfix(loss=f"{float(loss.detach()):.3f}")
    return model


def main(argv: list[str] | None = None) -> None:
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses(args=argv)
    prose = Path(options.prose).read_text(encoding="utf-8")
    tokenizer = make_tokenizer(prose, options.seed)
    model = train(new_model(options, tokenizer), options, tokenizer, prose)
    # bf16 halves the package; the demo and the tests load it in fp32
    model.to(torch.bfloat16).save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
