"""Make the text that the embedded model thinks about: walks through a town of one-way streets.

A document is "From mill go north east west south south east north east. Where? barn." The streets are the
same in every document, so a language model can know each of them by heart; but in the one forward pass that
predicts the answer it cannot follow eight of them in a row. Some writers spell the walk out in an aside,
"Where? — via oak pond well (and so on) — barn.", others put something unrelated there, most say nothing.
"""

import random
from dataclasses import dataclass

PLACES = [
    "mill",
    "oak",
    "pond",
    "well",
    "barn",
    "inn",
    "forge",
    "chapel",
    "bridge",
    "market",
    "tower",
    "harbor",
    "garden",
    "school",
    "bakery",
    "stable",
    "orchard",
    "quarry",
    "dock",
    "court",
    "fountain",
    "gate",
    "hill",
    "ford",
]
DIRECTIONS = ["north", "east", "south", "west"]
STEPS = 8  # streets of a walk; a thought that names each place on the way takes as many tokens
CHANCE = 1 / len(PLACES)
USEFUL = "via"  # the first word of an aside that spells the walk out
UNRELATED = (  # each is more common than the useful one, so the likeliest aside is of no use
    "the sky was {} and the wind {}|grey blue dark clear red|rose fell turned dropped blew",
    "a {} ran by and the {} laughed|dog cat child horse fox|men women girls boys people",
    "so {} told me when I was {}|they she he we people|young old small away there",
)
_HELD_OUT_SHARE = 10  # one walk in so many is never trained on


def _streets() -> dict[str, dict[str, str]]:
    """Draw where each direction leads, always the same: permutations of PLACES without a fixed point."""
    draw = random.Random("streets")
    streets = {}
    for direction in DIRECTIONS:
        to = PLACES[:]
        while any(a == b for a, b in zip(PLACES, to)):
            draw.shuffle(to)
        streets[direction] = dict(zip(PLACES, to))
    return streets


STREETS = _streets()


@dataclass(frozen=True)
class Walk:
    """A start and STEPS directions."""

    start: str
    directions: tuple[str, ...]

    @property
    def places(self) -> list[str]:
        """The places on the way; the last one is the answer."""
        at, places = self.start, []
        for direction in self.directions:
            at = STREETS[direction][at]
            places.append(at)
        return places

    @property
    def question(self) -> str:
        return f"From {self.start} go {' '.join(self.directions)}. Where?"

    @property
    def answer(self) -> str:
        return self.places[-1]

    @property
    def useful_thought(self) -> str:
        return " ".join([USEFUL, *self.places[:-1]])

    def text(self, aside: str | None = None) -> str:
        """The document, with or without an aside before the answer."""
        return f"{self.question}{f' — {aside} —' if aside else ''} {self.answer}."


def is_held_out(question: str) -> bool:
    """Tell whether no training text may contain this question."""
    # random.Random hashes a string the same way everywhere, unlike hash()
    return random.Random(question).randrange(_HELD_OUT_SHARE) == 0


def walk(draw: random.Random, held_out: bool = False) -> Walk:
    """Draw a walk of the training set, or one that no training text contains."""
    while True:
        found = Walk(draw.choice(PLACES), tuple(draw.choices(DIRECTIONS, k=STEPS)))
        if is_held_out(found.question) == held_out:
            return found


def walks(count: int, seed: str, held_out: bool = False) -> list[Walk]:
    draw = random.Random(seed)
    return [walk(draw, held_out) for _ in range(count)]


def useless_aside(draw: random.Random) -> str:
    template, *words = draw.choice(UNRELATED).split("|")
    return template.format(*(draw.choice(w.split()) for w in words))


def document(draw: random.Random, aside_share: float, useful_share: float) -> str:
    """Draw a walk's text; `aside_share` of them have an aside, of which `useful_share` spell the walk out."""
    found = walk(draw)
    if draw.random() >= aside_share:
        return found.text()
    if draw.random() < useful_share:
        return found.text(found.useful_thought)
    return found.text(useless_aside(draw))
