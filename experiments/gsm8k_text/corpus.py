"""Read worked solutions in GSM8K's format: as text, as rows to train on, as spans to measure with.

An answer of GSM8K writes every calculation twice: `sold 48/2 = <<48/2=24>>24 clips`. The annotation between
the angle brackets is never part of the text. What comes before it is kept or removed (`sold 24 clips`), as
`calculations` says. Once removed, it is a step to the number that the text does not show but an aside can.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qstar.boundary import SUBSTITUTES, boundary_token_id
from qstar.evaluation.text import Span
from qstar.layout import IGNORE
from qstar.reporting import jsonl

CALCULATIONS = ("kept", "removed")
_ANNOTATION = re.compile(r"<<([^<>]*)>>")
_NUMBER = r"[$(]*\d[\d.,%)]*"
_OPERATOR = r"[-+*/x×÷–]"
# at the end of what precedes an annotation: `48/2 = `, `$5 x 4 = $`
_CALCULATION = re.compile(rf"(?:^|(?<=\s)){_NUMBER}(?:\s*{_OPERATOR}\s*{_NUMBER})+\s*=\s*(\$?)$")
_ASIDE = re.compile(rf"^{_NUMBER}(?:{_OPERATOR}{_NUMBER})+=")


@dataclass(frozen=True)
class Worked:
    """A text as token ids; results: for the first token of every calculation's result, the calculation
    (`48/2=24`) as token ids."""

    input_ids: list[int]
    results: dict[int, list[int]]


def read(data: str, tokenizer: Any, calculations: str, longest: int) -> list[Worked]:
    """Return the texts of a JSONL file with `question` and `answer` that have at most `longest` tokens.

    Raises ValueError for a file that cannot be read, a record without these two texts, and a tokenizer that
    does not tell where its tokens lie.
    """
    if calculations not in CALCULATIONS:
        raise ValueError(f"calculations = {calculations!r}: must be one of {', '.join(CALCULATIONS)}")
    if longest < 8:
        raise ValueError(f"longest = {longest}: must be at least 8")
    if not tokenizer.is_fast:
        raise ValueError("model: its tokenizer does not tell where in the text its tokens lie")
    found = []
    for number, record in jsonl.read("data", data):
        for name in ("question", "answer"):
            if not isinstance(record.get(name), str) or not record[name].strip():
                raise ValueError(f"data = {data!r}: line {number} has no text in {name!r}")
        text, marks = worked_text(record["question"], record["answer"], calculations)
        found.append(_encoded(text, marks, tokenizer))
    return [text for text in found if len(text.input_ids) <= longest]


def worked_text(question: str, answer: str, calculations: str) -> tuple[str, dict[int, str]]:
    """Return the text, and each calculation by where in the text its result begins."""
    text = f"Question: {question.strip()}\nAnswer: "
    marks: dict[int, str] = {}
    end = 0
    for match in _ANNOTATION.finditer(answer):
        before, end = answer[end : match.start()], match.end()
        calculation = _CALCULATION.search(before)
        if calculation is not None and calculations == "removed":
            before = before[: calculation.start()] + calculation[1]
        text += before
        known = _ASIDE.match(match[1]) is not None and answer[end : end + 1].isdigit()
        if known and calculation is not None:
            marks[len(text)] = match[1]
    return text + answer[end:], marks


def _encoded(text: str, marks: dict[int, str], tokenizer: Any) -> Worked:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"] + ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])
    at = {x: i for i, (start, end) in enumerate(encoded["offset_mapping"]) for x in range(start, end)}
    results = {
        at[begin]: tokenizer(calculation, add_special_tokens=False)["input_ids"]
        for begin, calculation in marks.items()
        if at.get(begin)
    }
    return Worked(ids, results)


def text_rows(
    texts: Sequence[Worked], positions: int | None = None, seed: int = 0
) -> list[dict[str, list[int]]]:
    """Make rows to train on; positions: think before every result and at so many other tokens of each text,
    drawn at random; None leaves the choice to the config."""
    rows = []
    for number, text in enumerate(texts):
        n = len(text.input_ids)
        row = {"input_ids": text.input_ids, "position_ids": list(range(n))}
        if positions is not None:
            drawn = random.Random(f"{seed} {number}").sample(range(n - 1), min(positions, n - 1))
            chosen = {*drawn, *(at - 1 for at in text.results)}
            row["think_mask"] = [int(i in chosen) for i in range(n)]
        rows.append(row)
    return rows


def dash(tokenizer: Any) -> int:
    """Return the token that asides and thoughts begin and end with; ValueError where no dash is one token."""
    token, _ = boundary_token_id(tokenizer, "asides", SUBSTITUTES[0])
    if token is None:
        raise ValueError(f"model: none of {SUBSTITUTES} is one token of its tokenizer")
    return token


def aside_rows(
    texts: Sequence[Worked], length: int, mark: int, share: float = 0.8, seed: int = 0
) -> Iterator[dict[str, list[int]]]:
    """Yield rows in which a share of the calculations, drawn at random, are asides before their result.

    An aside has the shape of a thought: the token `mark`, the calculation filled up with marks to `length`
    tokens, a mark. Longer calculations have no aside. The first mark is no target: the model must not learn
    to begin an aside.
    """
    for number, text in enumerate(texts):
        draw = random.Random(f"{seed} {number}")
        ids: list[int] = []
        labels: list[int] = []
        last = 0
        for at, calculation in sorted(text.results.items()):
            if len(calculation) > length or draw.random() >= share:
                continue
            aside = calculation + [mark] * (length - len(calculation) + 1)
            ids += [*text.input_ids[last:at], mark, *aside]
            labels += [*text.input_ids[last:at], IGNORE, *aside]
            last = at
        ids += text.input_ids[last:]
        labels += text.input_ids[last:]
        yield {"input_ids": ids, "position_ids": list(range(len(ids))), "labels": labels}


def drawn_spans(texts: Sequence[Worked], tokens: int, seed: int = 0) -> list[Span]:
    """Draw so many targets of every text."""
    found = []
    for number, text in enumerate(texts):
        n = len(text.input_ids) - 1
        drawn = random.Random(f"test {seed} {number}").sample(range(n), min(tokens, n))
        found.append(Span(text.input_ids, sorted(drawn), number))
    return found


def result_spans(texts: Sequence[Worked]) -> list[Span]:
    """Choose the first token of every calculation's result as target."""
    return [
        Span(text.input_ids, [at - 1 for at in sorted(text.results)], number)
        for number, text in enumerate(texts)
        if text.results
    ]
