"""Make the embedded language model of `qstar demo`, in about ten minutes on two cores.

A byte-level BPE of 2,048 tokens and a Llama of about one million parameters, trained from a fixed seed on
prose and on walks (qstar/demo/town.py). The model learns the useful asides while they are common; then they
become rare: half of the documents carry an aside, and one aside in five is useful.
"""

import sys

import torch

from experiments.shared import study
from experiments.tiny_lm.tiny_lm_training import TinyLmArguments, make_tokenizer, new_model, train
from qstar.data import read_text


def main(argv: list[str] | None = None) -> int:
    return study.run("tiny_lm", [TinyLmArguments], make, argv)


def make(options: TinyLmArguments) -> None:
    prose = read_text("prose", options.prose)
    tokenizer = make_tokenizer(prose, options.seed)
    model = train(new_model(options.seed, tokenizer), options, tokenizer, prose)
    # bf16 halves the package; the demo and the tests load it in fp32
    model.to(torch.bfloat16).save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    sys.exit(main())
