"""Score cot-maj@k: the model writes k chains of thought aloud, each ends in a number, the majority answers.

Source: arXiv 2403.09629, section 5 and appendix, as in the authors' code: chains are sampled at temperature
0.9, cut where another question begins, then asked for the answer, whose first integer counts; a chain without
an integer is a vote for none.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qstar.data import left_padded
from qstar.evaluation.predictions import ThoughtSampling
from qstar.evaluation.questions import Question
from qstar.evaluation.run import Figures, Task
from qstar.model import QuietStarForCausalLM
from qstar.option_checks import check_least
from qstar.supported import context_length

BEGIN = " Let's think step by step."
ASK = "\nTherefore, the answer (arabic numerals) is"
THINK = {"without": "never", "thoughts": "always"}


def first_integer(text: str) -> int | None:
    found = re.search(r"\d+", text.replace(",", ""))
    return int(found.group()) if found else None


@dataclass(frozen=True)
class MajorityVote(Task):
    """Questions to vote on, with thoughts before every token of a chain; the figures of a question are the
    answers of its chains, chain, the share of them that is right, and majority, 0 or 1. Raises ValueError for
    an option out of range."""

    items: Sequence[Question]
    tokenizer: Any
    votes: int = 8
    temperature: float = 0.9
    chain_tokens: int = 384
    answer_tokens: int = 12
    ways = tuple(THINK)
    metrics = ("chain", "majority")

    def __post_init__(self) -> None:
        check_least(self, votes=1, chain_tokens=1, answer_tokens=1)
        if not self.temperature > 0:
            raise ValueError(f"temperature = {self.temperature}: must be positive, or all votes are one")

    @property
    def lengths(self) -> list[int]:
        return [len(self._ids(question.prompt + BEGIN)) for question in self.items]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, verbose=False)["input_ids"]

    def check(self, model: QuietStarForCausalLM) -> None:
        slots = model.quiet_star.thought_length + 2
        new = self.chain_tokens + len(self._ids(ASK)) + self.answer_tokens
        needed = max(self.lengths) + new - 1 + slots
        context = context_length(model.config)
        if context is not None and needed > context:
            raise ValueError(
                f"chain_tokens = {self.chain_tokens}: the longest question, its chain, the answer and a "
                f"thought take {needed} positions, more than the model's context of {context}"
            )

    def score(self, model, questions, ways, thinking, generator) -> dict[str, list[Figures]]:
        asked = [self.items[i] for i in questions]
        prompts = [question.prompt + BEGIN for question in asked for _ in range(self.votes)]
        figures: dict[str, list[Figures]] = {}
        for way in ways:
            how = THINK[way], thinking, generator.initial_seed()
            texts = self._continued(model, prompts, self.chain_tokens, ["Q:"], *how)
            finals = [prompt + self._chain(text) + ASK for prompt, text in zip(prompts, texts)]
            texts = self._continued(model, finals, self.answer_tokens, None, *how)
            answers = [first_integer(text) for text in texts]
            figures[way] = [
                self._counted(question, answers[i * self.votes : (i + 1) * self.votes])
                for i, question in enumerate(asked)
            ]
        return figures

    @staticmethod
    def _chain(text: str) -> str:
        """Cut a text where another question begins, or at the second gap of two empty lines."""
        text = text.split("Q:")[0]
        return "\n\n\n".join(text.split("\n\n\n")[:2]).rstrip()

    @staticmethod
    def _counted(question: Question, answers: list[int | None]) -> Figures:
        right = first_integer(question.answer)
        ((majority, _),) = Counter(answers).most_common(1)
        share = sum(answer == right for answer in answers) / len(answers)
        return {"answers": answers, "chain": share, "majority": int(majority == right)}

    def _continued(
        self,
        model: QuietStarForCausalLM,
        prompts: list[str],
        tokens: int,
        stop: list[str] | None,
        think: str,
        thinking: ThoughtSampling,
        seed: int,
    ) -> list[str]:
        """Return what the model writes after each prompt, at most so many tokens."""
        encoded = [self._ids(prompt) for prompt in prompts]
        ids, mask = left_padded(encoded)
        eos = self.tokenizer.eos_token_id
        written = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=tokens,
            do_sample=True,
            temperature=self.temperature,
            top_k=0,
            top_p=1.0,
            eos_token_id=eos,
            pad_token_id=eos or 0,
            stop_strings=stop,
            tokenizer=self.tokenizer,
            think=think,
            thought_temperature=thinking.temperature,
            generator=torch.Generator(model.device).manual_seed(seed),
        )
        # decode with the prompt: alone, some tokenizers lose the space before the first token
        before = [len(self.tokenizer.decode(x, skip_special_tokens=True)) for x in encoded]
        new = written[:, ids.shape[1] :].tolist()
        whole = [self.tokenizer.decode(x + y, skip_special_tokens=True) for x, y in zip(encoded, new)]
        return [text[n:] for text, n in zip(whole, before)]
