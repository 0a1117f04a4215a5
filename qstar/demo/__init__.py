"""Embed a tiny language model, the text it learned from, and the training and tests of `qstar demo`."""

from pathlib import Path

TINY_LM = Path(__file__).with_name("tiny_lm")  # made by `python -m experiments.tiny_lm`
