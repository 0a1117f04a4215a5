"""Does a real language model think? A built two-hop task on real facts: `qstar proof-real`."""
