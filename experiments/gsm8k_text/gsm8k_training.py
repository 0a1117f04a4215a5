"""Train and test every condition of the study."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from experiments.gsm8k_text.corpus import Worked, aside_rows, dash, text_rows
from experiments.shared.fine_tuning import FineTuning, fine_tune
from experiments.shared.small_llama import digest, made_once
from qstar.checkpoint import fingerprint
from qstar.config import QuietStarConfig
from qstar.evaluation.predictions import ALONE, ThoughtSampling, pause_token
from qstar.evaluation.results import Results
from qstar.evaluation.run import Contestant, evaluate
from qstar.evaluation.text import SMOOTHED, PlainText, Span
from qstar.model import QuietStarForCausalLM

BASE, TOLD, CONTROL, WITHOUT, THOUGHTS = "base", "after the asides", "control", "w = 0", "thoughts"
SHUFFLED, ALONE_NAME = "shuffled thoughts", "w = 1"
# conditions of the model that thinks, in the order of the tables; the others are compared with "thoughts"
TESTS = {
    "without": WITHOUT,
    "pause": "pause",
    ALONE: ALONE_NAME,
    "shuffled": SHUFFLED,
    "thoughts": THOUGHTS,
}
JUDGE = f"{BASE}, smoothed"
EVALUATION_BATCH = 8


@dataclass(frozen=True)
class Gsm8kStudy:
    """What all conditions share.

    asides: how the model trains while the calculations stand in sight (0 steps: there is no such phase).
    recipe: of what follows, with thoughts or without. positions: as `text_rows` takes them. folder: where the
    model after the asides is kept.
    """

    model: str
    tokenizer: PreTrainedTokenizerBase
    train: Sequence[Worked]
    config: QuietStarConfig
    recipe: FineTuning
    asides: FineTuning
    positions: int | None
    seed: int
    folder: Path

    def begun(self) -> str:
        """Return the folder of the model from which the control and the one that thinks go on."""
        if not self.asides.steps:
            return self.model
        mark = dash(self.tokenizer)
        rows = list(aside_rows(self.train, self.config.thought_length, mark, seed=self.seed))
        settings = [fingerprint(self.model), rows, self.seed, asdict(self.asides)]
        path = made_once(
            self.folder / f"asides-{digest(settings)}",
            lambda: fine_tune(self.model, self.tokenizer, rows, None, self.asides, self.seed),
            self.tokenizer,
        )
        return str(path)

    def contestants(self) -> list[Contestant]:
        """Return the models in the order of the tables; each is trained when it is opened."""
        rows = text_rows(self.train, self.positions, self.seed)

        def plain(load: Callable[[], Any]) -> Callable[[], QuietStarForCausalLM]:
            return lambda: QuietStarForCausalLM(load(), QuietStarConfig(thought_length=0))

        def read(folder: Callable[[], str]) -> Callable[[], Any]:
            return lambda: AutoModelForCausalLM.from_pretrained(folder(), dtype="float32")

        def trained(config: QuietStarConfig | None) -> Callable[[], Any]:
            return lambda: fine_tune(self.begun(), self.tokenizer, rows, config, self.recipe, self.seed)

        judge = {"without": BASE, SMOOTHED: JUDGE}
        found = [Contestant(BASE, plain(read(lambda: self.model)), judge, plain=True)]
        if self.asides.steps:
            found.append(Contestant(TOLD, plain(read(self.begun)), {"without": TOLD}, plain=True))
        found.append(Contestant(CONTROL, plain(trained(None)), {"without": CONTROL}, plain=True))
        found.append(Contestant(THOUGHTS, trained(self.config), TESTS))
        return found

    @property
    def conditions(self) -> list[str]:
        """In the order of the tables."""
        return [name for x in self.contestants() for way, name in x.conditions.items() if way != SMOOTHED]

    def measure(self, asked: Sequence[tuple[Sequence[Span], Results]]) -> None:
        """Add to the results of each list of spans what they lack; train no model that none of them lacks."""
        thinking = ThoughtSampling(0.0, pause_token(self.tokenizer))
        for contestant in self.contestants():
            conditions = contestant.conditions.values()
            waiting = [
                (spans, results)
                for spans, results in asked
                if not all(results.has(name, i) for name in conditions for i in range(len(spans)))
            ]
            if not waiting:
                continue
            model = contestant.open()
            for spans, results in waiting:
                here = replace(contestant, open=[model].pop)
                evaluate(PlainText(spans), [here], results, EVALUATION_BATCH, thinking, self.seed)
            del model
