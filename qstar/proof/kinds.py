"""The built kinds of text: questions whose answer takes eight steps in a row, and asides that show them.

A document is a question and its answer, "... Where? barn.", and some writers put an aside between the two,
"... Where? — via oak pond (and so on) — barn.": the word "via" and the seven results before the answer, one
token a word, so that every useful aside has STEPS tokens. Asides of no use are as long.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from qstar.demo.town import DIRECTIONS, PLACES, STEPS, UNRELATED, USEFUL, Walk, is_held_out

_NUMBERS = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen twenty
"""
_NAMES = """
Ann Ben Carl Dora Eve Fred Gus Hans Ida Jack Kate Leo Max Nora Olga Paul Ruth Sam Tom Una Vera Will Xena Zoe
"""
_ANIMALS = """
ant bear cat deer eel fox goat hare ibis jay kite lion mole newt owl pig quail rat seal toad urchin viper wolf
yak
"""
NUMBERS, NAMES, ANIMALS = _NUMBERS.split(), _NAMES.split(), _ANIMALS.split()
MOST_CHANGE = 5  # of a sum: what is got or lost at once
PAIRS = 11  # of a family: parent and child


@dataclass(frozen=True)
class Question:
    """steps: the STEPS - 1 results before the answer, one word each."""

    text: str
    steps: tuple[str, ...]
    answer: str

    @property
    def useful_aside(self) -> str:
        return " ".join([USEFUL, *self.steps])

    def document(self, aside: str | None = None) -> str:
        """The text, with or without an aside before the answer."""
        return f"{self.text}{f' — {aside} —' if aside else ''} {self.answer}."


@dataclass(frozen=True)
class Kind:
    """draw: a question at random; answers: every word that can be one."""

    name: str
    draw: Callable[[random.Random], Question]
    answers: tuple[str, ...]

    def question(self, draw: random.Random, held_out: bool = False) -> Question:
        """One of the training set, or one of the tenth that no training text contains."""
        while True:
            found = self.draw(draw)
            if is_held_out(found.text) == held_out:
                return found

    def questions(self, count: int, seed: str, held_out: bool = False) -> list[Question]:
        draw = random.Random(f"{self.name} {seed}")
        return [self.question(draw, held_out) for _ in range(count)]


def walk(draw: random.Random) -> Question:
    """Chained states: a walk through the demo's town, whose streets are the same in every document."""
    found = Walk(draw.choice(PLACES), tuple(draw.choices(DIRECTIONS, k=STEPS)))
    return Question(found.question, tuple(found.places[:-1]), found.answer)


def sum_in_words(draw: random.Random) -> Question:
    """What somebody has left after so many gains and losses; never less than zero nor more than twenty."""
    has = draw.randrange(len(NUMBERS))
    words, results = [f"Tom had {NUMBERS[has]}"], []
    for _ in range(STEPS):
        changes = [x for x in range(-MOST_CHANGE, MOST_CHANGE + 1) if x and 0 <= has + x < len(NUMBERS)]
        change = draw.choice(changes)
        has += change
        words.append(f"{'got' if change > 0 else 'lost'} {NUMBERS[abs(change)]}")
        results.append(NUMBERS[has])
    return Question(f"{' '.join(words)}. Now?", tuple(results[:-1]), results[-1])


def kinship(draw: random.Random) -> Question:
    """A family, told pair by pair (child, parent) in any order; asked for is the ancestor of STEPS
    generations ago, beyond whom the line may go on."""
    line = draw.sample(NAMES, PAIRS + 1)
    pairs = [f"{child} {parent}" for child, parent in pairwise(line)]
    draw.shuffle(pairs)
    who = draw.randrange(PAIRS + 1 - STEPS)
    ancestors = line[who + 1 : who + 1 + STEPS]
    return Question(
        f"Parents: {', '.join(pairs)}. Far above {line[who]}?", tuple(ancestors[:-1]), ancestors[-1]
    )


def sorting(draw: random.Random) -> Question:
    """Seven animals, and which is the middle one by the alphabet."""
    animals = draw.sample(ANIMALS, STEPS - 1)
    order = sorted(animals)
    return Question(f"Sort {' '.join(animals)}. Middle?", tuple(order), order[len(order) // 2])


KINDS = {
    kind.name: kind
    for kind in (
        Kind("walks", walk, tuple(PLACES)),
        Kind("sums", sum_in_words, tuple(NUMBERS)),
        Kind("kinship", kinship, tuple(NAMES)),
        Kind("sorting", sorting, tuple(ANIMALS)),
    )
}


def useless_aside(draw: random.Random) -> str:
    template, *words = draw.choice(UNRELATED).split("|")
    return template.format(*(draw.choice(w.split()) for w in words))


def document(kind: Kind, draw: random.Random, aside_share: float, useful_share: float) -> str:
    """A text of the training set; `aside_share` of them carry an aside, of which `useful_share` show the
    steps."""
    found = kind.question(draw)
    if draw.random() >= aside_share:
        return found.document()
    return found.document(found.useful_aside if draw.random() < useful_share else useless_aside(draw))
