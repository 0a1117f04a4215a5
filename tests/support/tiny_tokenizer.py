"""A byte-level BPE trained on the spot: no download."""

from functools import cache
from pathlib import Path

from tiny_models import base_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PROSE = (
    "the state of the union is strong and the people are well. we meet today to speak of the work that is "
    "done and of the work that is before us: the schools, the roads, the farms. "
)


@cache
def _trained(em_dash: bool, vocabulary: int, more: str) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PROSE + ("— " * 40 if em_dash else "") + more], trainer)
    return tokenizer.to_str()


def tiny_tokenizer(
    em_dash: bool = True, pad: bool = False, vocabulary: int = 300, more: str = ""
) -> PreTrainedTokenizerFast:
    """end-of-text is id 0; without an em dash of its own a byte-level tokenizer spells it in three tokens.
    more: text that it also learns from."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(em_dash, vocabulary, more)),
        eos_token="<eos>",
        pad_token="<eos>" if pad else None,
    )


def saved_base_model(folder: Path, kind: str = "llama", em_dash: bool = True, **changes) -> Path:
    """A tiny base model with its tokenizer, in a folder, as `qstar train --model` takes it."""
    tokenizer = tiny_tokenizer(em_dash)
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    base_model(kind, **(ids | changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
