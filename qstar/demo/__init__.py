"""The embedded default: a tiny language model, the text it learned from, and the whole story in minutes."""

from pathlib import Path

TINY_LM = Path(__file__).with_name("tiny_lm")  # made by make_tiny_lm.py
