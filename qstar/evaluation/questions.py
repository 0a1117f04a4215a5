"""Read questions whose answer is a few tokens of a fixed set: GSM8K and CommonsenseQA in the paper's format,
and any other multiple choice.

Source: arXiv 2403.09629, section 5, as in the authors' code: the answer follows "A:" and ends with a newline;
each of its tokens that is in the set is scored; others (the space before a number, the comma inside one) are
read and not scored.
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from string import ascii_uppercase
from typing import Any

log = logging.getLogger(__name__)
DIGITS = re.compile(r"[Ġ▁ ]?[0-9]+")  # a token that is a number, perhaps with the space before it


@dataclass(frozen=True)
class Question:
    """A question as text: prompt ends with "A:", answer begins with a space and ends with a newline; labels
    of the choices, or None if the answer is a number."""

    prompt: str
    answer: str
    labels: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Item:
    """A question as tokens: position at[i] predicts its i-th scored token, which is allowed[targets[i]];
    allowed: the ids of the set."""

    input_ids: list[int]
    at: list[int]
    targets: list[int]
    allowed: tuple[int, ...]


def gsm8k(record: dict[str, Any]) -> Question:
    """Read a record with `question` and `answer`; the number after "####" counts. Raises ValueError for any
    other record."""
    question, answer = (record.get(name) for name in ("question", "answer"))
    if not isinstance(question, str) or not isinstance(answer, str) or "####" not in answer:
        raise ValueError("has no texts `question` and `answer`, the latter with its number after ####")
    number = answer.split("####")[-1].strip()
    if not re.search("[0-9]", number):
        raise ValueError(f"its answer {number!r} holds no digit")
    return Question(f"Q: {question}\nA:", f" {number}\n")


def choice(record: dict[str, Any]) -> Question:
    """Read a record of multiple choice: `question` (or `question_stem`), `choices` {label, text} or a list of
    texts, and `answerKey` (or `answer`), a label or, with a list, an index. In CommonsenseQA's first format
    `question` holds stem and choices. Raises ValueError for any other record."""
    question: Any = record.get("question", record.get("question_stem"))
    choices = record.get("choices")
    if isinstance(question, dict):
        question, choices = question.get("stem"), question.get("choices")
    labels, texts = _choices(choices)
    key = record.get("answerKey", record.get("answer"))
    if isinstance(key, int) and 0 <= key < len(labels):
        key = labels[key]
    if not isinstance(question, str) or len(labels) < 2 or len(labels) != len(texts):
        raise ValueError("has no text `question` and two or more `choices`, each with label and text")
    if key not in labels:
        raise ValueError(f"its answerKey (or answer) is {key!r}: must be one of {labels}")
    lines = [f"({label}) {text}" for label, text in zip(labels, texts)]
    return Question("\n".join([f"Q: {question}", *lines, "A:"]), f" {key}\n", tuple(labels))


def _choices(choices: Any) -> tuple[list[str], list[str]]:
    """Return labels and texts, both empty for choices of neither form."""
    labels: Any = None
    texts: Any = None
    if isinstance(choices, dict):
        labels, texts = choices.get("label"), choices.get("text")
    elif isinstance(choices, list) and all(isinstance(x, dict) for x in choices):
        labels, texts = ([x.get(name) for x in choices] for name in ("label", "text"))
    elif isinstance(choices, list) and len(choices) <= len(ascii_uppercase):
        labels, texts = list(ascii_uppercase[: len(choices)]), choices
    whole = all(isinstance(x, list) and all(isinstance(text, str) for text in x) for x in (labels, texts))
    return (labels, texts) if whole else ([], [])


class Tokens:
    """Turns questions into tokens of one tokenizer. Raises ValueError if that has no token for a newline."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.newline = self._ids("0\n", add_special_tokens=False)[-1]
        if tokenizer.decode([self.newline]) != "\n":
            raise ValueError("tokenizer: a newline after a number must be a token of its own")
        numbers = {i for text, i in tokenizer.get_vocab().items() if DIGITS.fullmatch(text)}
        self.numbers = tuple(sorted(numbers | {self.newline}))
        self._labels: dict[str, int] = {}

    def _ids(self, text: str, **options: Any) -> list[int]:
        return self.tokenizer(text, verbose=False, **options)["input_ids"]

    def _label(self, label: str) -> int:
        """Return the token of a label after "A:". Raises ValueError for a label of several tokens."""
        if label not in self._labels:
            answer, _ = self._answer(f"A: {label}\n", "A:")
            tokens = [i for i in answer if self.tokenizer.decode([i], skip_special_tokens=True).strip()]
            if len(tokens) != 1:
                raise ValueError(f"choices: label {label!r} must be one token of this tokenizer")
            self._labels[label] = tokens[0]
        return self._labels[label]

    def _answer(self, text: str, prompt: str) -> tuple[list[int], int]:
        """Return the tokens of `text` that are not the prompt's, and how many come before them."""
        whole, before = self._ids(text), self._ids(prompt)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(whole, before)))
        return whole[same:], same

    def item(self, question: Question) -> Item:
        """Tokenize a question. Raises ValueError if the answer's tokens of the set do not spell it."""
        if question.labels is None:
            allowed, wanted = self.numbers, re.sub("[^0-9\n]", "", question.answer)
        else:
            allowed = tuple(sorted({*map(self._label, question.labels), self.newline}))
            wanted = question.answer[1:]
        answer, before = self._answer(question.prompt + question.answer, question.prompt)
        scored = [i for i, token in enumerate(answer) if token in allowed]
        spelled = "".join(self.tokenizer.decode([answer[i]]).strip(" ") for i in scored)
        if spelled != wanted:
            raise ValueError(
                f"its answer {question.answer.strip()!r} has tokens {answer}, of which those of the set do "
                "not spell it"
            )
        return Item(
            input_ids=self._ids(question.prompt)[:before] + answer,
            at=[before + i - 1 for i in scored],
            targets=[allowed.index(answer[i]) for i in scored],
            allowed=allowed,
        )


def fitted(items: Iterable[Item], longest: int | None, truncate: bool = False) -> tuple[list[Item], int]:
    """Return the items and how many of them were cut to `longest` tokens (None: no limit).

    Cuts on the left and logs it if `truncate`. Raises ValueError for an item that is too long otherwise, or
    whose answer would be cut.
    """
    found, cut = [], 0
    for number, item in enumerate(items):
        over = 0 if longest is None else len(item.input_ids) - longest
        if over > 0:
            if not truncate or over > min(item.at):
                raise ValueError(
                    f"question {number} has {len(item.input_ids)} tokens with its answer: the context holds "
                    f"{longest} beside a thought; truncate_prompt = True cuts questions on the left"
                )
            cut += 1
            item = Item(item.input_ids[over:], [i - over for i in item.at], item.targets, item.allowed)
        found.append(item)
    if cut:
        log.warning("truncate_prompt: %d of %d questions are cut to %d tokens", cut, len(found), longest)
    return found, cut
