"""Make the embedded language model of `qstar demo`: `python -m experiments.tiny_lm --prose FILE`."""
