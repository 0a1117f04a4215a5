"""Train and test one seed after another, stage by stage; a later run skips what is done already."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerBase

from experiments.scratch_model import scratch_base, scratch_training
from experiments.scratch_model.scratch_training import PROSE, WAYS
from experiments.shared.small_llama import digest, made_once
from qstar.reporting.results_file import ResultsFile

STAGES = ("base", "control", "thoughts")
NAMES = dict(zip(WAYS, ("w = 0", "thoughts", "shuffled")))  # conditions of the model that thinks


@dataclass(frozen=True)
class ScratchStudy:
    """What every seed shares: recipes, tokenizer, tests, and the folder with models and results."""

    folder: Path
    making: scratch_base.BaseRecipe
    recipe: scratch_training.TrainingRecipe
    tokenizer: PreTrainedTokenizerBase
    tests: dict[str, scratch_training.Unseen]
    found: ResultsFile

    def run(self, seed: int, stage: str) -> None:
        """Train and test what a stage of a seed is about, unless the results have it."""
        thinks = stage == "thoughts"
        names = NAMES if thinks else {"without": stage}
        ways = tuple(names)
        if (seed, names[ways[-1]], PROSE) in self.found:  # the last line of the stage
            return
        began = time.perf_counter()
        model = scratch_training.thinker(self._base(seed), self.tokenizer)
        hard = {kind: scratch_training.hard(model, test) for kind, test in self.tests.items()}
        if stage != "base":
            trained = scratch_training.train(self._base(seed), self.recipe, self.tokenizer, seed, thinks)
            model = trained if thinks else scratch_training.thinker(trained, self.tokenizer)
        if thinks:
            model.save_pretrained(self.folder / f"thinks-{seed}")
            self.tokenizer.save_pretrained(self.folder / f"thinks-{seed}")
        lines = []
        for kind, test in self.tests.items():
            sums = scratch_training.measure(model, test, hard[kind], ways, seed)
            more: dict[str, float] = {}
            if test.questions and stage != "control":
                more["useful"] = scratch_training.useful_share(model, test, seed)
                more["told"] = scratch_base.told_accuracy(model.base, self.tokenizer, kind, test.questions)
            for way, name in names.items():
                lines.append(
                    {"seed": seed, "condition": name, "kind": kind, "seconds": 0.0, **more, **sums[way]}
                )
        lines[-1]["seconds"] = time.perf_counter() - began
        for line in lines:
            self.found.add(line)

    def _base(self, seed: int) -> LlamaForCausalLM:
        """Load the base model of a seed, made where it is not there yet."""
        path = made_once(
            self.folder / f"base-{seed}-{digest(asdict(self.making))}",
            lambda: scratch_base.train(self.making, self.tokenizer, seed),
            self.tokenizer,
        )
        return AutoModelForCausalLM.from_pretrained(path, dtype="float32")
