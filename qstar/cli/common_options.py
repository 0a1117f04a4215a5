"""Options that several commands share."""

from dataclasses import dataclass

import torch
from transformers.hf_argparser import HfArg

from qstar.option_checks import check_least

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class CheckpointArguments:
    """Which model."""

    model: str = HfArg(help="Folder of a Quiet-STaR checkpoint.")


@dataclass
class TextFileArguments(CheckpointArguments):
    """A model and a text that it reads in spans."""

    text: str = HfArg(help="A text file.")
    span_length: int = HfArg(default=256, help="Tokens read at once; a longer text is cut into spans.")
    batch_size: int = HfArg(default=4, help="Spans read together.")
    json: bool = HfArg(default=False, help="Print only the JSON document.")

    def __post_init__(self) -> None:
        check_least(self, span_length=3, batch_size=1)
