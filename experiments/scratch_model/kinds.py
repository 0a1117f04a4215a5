"""Build kinds of text: questions whose answer takes eight steps in a row, and asides that show them.

A document is a question and its answer, "... Where? barn.", and some writers put an aside between the two,
"... Where? — via oak pond (and so on) — barn.": a first word, which differs between kinds, and the seven
results before the answer. Each word is one token, so every useful aside has STEPS tokens. Useless asides are
as long, and the same for all kinds.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

from qstar.demo.town import DIRECTIONS, PLACES, STEPS, USEFUL, Walk, is_held_out, useless_aside

_NUMBERS = "one two three four five six seven eight nine ten eleven twelve"
_NAMES = """
Ann Ben Cora Dan Eve Fred Greta Hans Ida Jack Kate Leo Mary Nick Olga Paul Rosa Sam Tess Udo Vera Will Xenia
Zach
"""
_ANIMALS = """
ant bear cat deer eel fox goat hare ibis jay kite lion mole newt owl pig quail rat seal toad urchin viper wolf
yak
"""
NUMBERS, NAMES, ANIMALS = _NUMBERS.split(), _NAMES.split(), _ANIMALS.split()
LONGEST_WAIT = 4  # of a sum
COUPLES = 3  # of a generation of the family, whose NAMES are by generation, of women and men in turn


@dataclass(frozen=True)
class BuiltQuestion:
    """A question of one kind; steps: the STEPS - 1 results before the answer, one word each; begins: the
    first word of the useful aside."""

    text: str
    steps: tuple[str, ...]
    answer: str
    begins: str

    @property
    def useful_aside(self) -> str:
        return " ".join([self.begins, *self.steps])

    def document(self, aside: str | None = None) -> str:
        """Return the text, with or without an aside before the answer."""
        return f"{self.text}{f' — {aside} —' if aside else ''} {self.answer}."


@dataclass(frozen=True)
class Kind:
    """A kind of question; draw: draws one at random; answers: every word that can be one."""

    name: str
    draw: Callable[[random.Random], BuiltQuestion]
    answers: tuple[str, ...]

    def question(self, draw: random.Random, held_out: bool = False) -> BuiltQuestion:
        """Draw a question of the training set, or one of the tenth that no training text contains."""
        while True:
            found = self.draw(draw)
            if is_held_out(found.text) == held_out:
                return found

    def questions(self, count: int, seed: str, held_out: bool = False) -> list[BuiltQuestion]:
        draw = random.Random(f"{self.name} {seed}")
        return [self.question(draw, held_out) for _ in range(count)]


def walk(draw: random.Random) -> BuiltQuestion:
    """Draw a walk through the demo's town, whose streets are the same in every document."""
    found = Walk(draw.choice(PLACES), tuple(draw.choices(DIRECTIONS, k=STEPS)))
    return BuiltQuestion(found.question, tuple(found.places[:-1]), found.answer, USEFUL)


def sum_in_words(draw: random.Random) -> BuiltQuestion:
    """Ask what a clock of twelve hours shows after waits of one to LONGEST_WAIT hours."""
    hour = draw.randrange(len(NUMBERS))
    waits = [draw.randint(1, LONGEST_WAIT) for _ in range(STEPS)]
    _, *results = (NUMBERS[total % len(NUMBERS)] for total in accumulate(waits, initial=hour))
    words = " ".join(NUMBERS[wait - 1] for wait in waits)
    return BuiltQuestion(
        f"At {NUMBERS[hour]} wait {words} hours. Now?", tuple(results[:-1]), results[-1], "until"
    )


def _family() -> dict[str, dict[str, str]]:
    """Draw who is whose mother, father, eldest and youngest child, always the same. Each couple has a
    daughter and a son, who marry children of other couples; the first generation has no parents, the last no
    children."""
    draw = random.Random("family")
    family: dict[str, dict[str, str]] = {name: {} for name in NAMES}
    women, men = (
        [NAMES[i : i + 2 * COUPLES : 2] for i in range(sex, len(NAMES), 2 * COUPLES)] for sex in (0, 1)
    )
    for mothers, fathers, daughters, sons in zip(women, men, women[1:], men[1:]):
        for i in range(COUPLES):  # a woman's husband is the son of the couple before that of her parents
            mother, father, daughter, son = mothers[i], fathers[i - 1], daughters[i], sons[i]
            eldest, youngest = draw.sample((daughter, son), 2)
            for parent in (mother, father):
                family[parent] = family[parent] | {"eldest": eldest, "youngest": youngest}
            for child in (daughter, son):
                family[child] = {"mother": mother, "father": father}
    return family


FAMILY = _family()


def kinship(draw: random.Random) -> BuiltQuestion:
    """Ask for somebody's mother's eldest's father's (and so on), in a family that is always the same."""
    person = draw.choice(NAMES)
    words, results = [f"Of {person} the"], []
    for _ in range(STEPS):
        relation = draw.choice(list(FAMILY[person]))
        person = FAMILY[person][relation]
        words.append(relation)
        results.append(person)
    return BuiltQuestion(f"{' '.join(words)}. Who?", tuple(results[:-1]), results[-1], "through")


def sorting(draw: random.Random) -> BuiltQuestion:
    """Ask which of seven animals is in the middle by the alphabet."""
    animals = draw.sample(ANIMALS, STEPS - 1)
    order = sorted(animals)
    return BuiltQuestion(f"Sort {' '.join(animals)}. Middle?", tuple(order), order[len(order) // 2], "order")


KINDS = {
    kind.name: kind
    for kind in (
        Kind("walks", walk, tuple(PLACES)),
        Kind("sums", sum_in_words, tuple(NUMBERS)),
        Kind("kinship", kinship, tuple(NAMES)),
        Kind("sorting", sorting, tuple(ANIMALS)),
    )
}


def document(kind: Kind, draw: random.Random, aside_share: float, useful_share: float) -> str:
    """Draw a training text; `aside_share` of them carry an aside, of which `useful_share` show the steps."""
    found = kind.question(draw)
    if draw.random() >= aside_share:
        return found.document()
    return found.document(found.useful_aside if draw.random() < useful_share else useless_aside(draw))
