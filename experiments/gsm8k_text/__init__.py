"""Does a real language model think on natural text? GSM8K's, in every condition: `qstar proof-text`."""
