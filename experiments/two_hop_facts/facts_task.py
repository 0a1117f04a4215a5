"""Build the two-hop task: "The capital of France" -> " P".

The first hop is a fact that the model has learned ("Paris"), the second its first letter. Neither the word
nor the letter is ever in the text before it.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from experiments.two_hop_facts.facts import TESTED, Fact, facts
from qstar.layout import IGNORE

TEST_FACTS = 100


@dataclass(frozen=True)
class Split:
    """Facts to train on, and others to test with; letters: the token ids of " A" to " Z"."""

    tokenizer: PreTrainedTokenizerBase
    train: list[Fact]
    test: list[Fact]
    letters: list[int]

    @classmethod
    def make(cls, tokenizer: PreTrainedTokenizerBase, number: int, test_facts: int = TEST_FACTS) -> Split:
        """Draw the split of this number. Raises ValueError where a letter is not one token, and for a
        test_facts that leaves no fact of its kind to train on."""
        spelt = tokenizer([f" {x}" for x in string.ascii_uppercase], add_special_tokens=False)["input_ids"]
        if any(len(ids) != 1 for ids in spelt):
            raise ValueError("model: its tokenizer has not every letter after a space as one token")
        order = random.Random(f"split {number}")
        tested = [x for x in facts() if x.relation in TESTED]
        if not 1 <= test_facts < len(tested):
            raise ValueError(f"test_facts = {test_facts}: must be in [1, {len(tested) - 1}]")
        order.shuffle(tested)
        others = [x for x in facts() if x.relation not in TESTED]
        return cls(tokenizer, tested[test_facts:] + others, tested[:test_facts], [ids[0] for ids in spelt])

    def rows(self, of: list[Fact]) -> list[dict[str, list[int]]]:
        """Make rows of question, letter and full stop; the model thinks before the letter, the one target."""
        (stop,) = self.tokenizer(["."], add_special_tokens=False)["input_ids"]
        rows = []
        for fact in of:
            ids = self.tokenizer(fact.question, add_special_tokens=False)["input_ids"]
            n = len(ids)
            text = [*ids, self.letter(fact), *stop]
            rows.append(
                {
                    "input_ids": text,
                    "position_ids": list(range(len(text))),
                    "labels": [IGNORE] * n + [text[n]] + [IGNORE] * len(stop),
                    "think_mask": [0] * (n - 1) + [1] + [0] * (1 + len(stop)),
                }
            )
        return rows

    @property
    def numbers(self) -> list[int]:
        """Where in `facts()` each test fact stands."""
        every = {fact: i for i, fact in enumerate(facts())}
        return [every[fact] for fact in self.test]

    def letter(self, fact: Fact) -> int:
        return self.letters[string.ascii_uppercase.index(fact.letter)]
