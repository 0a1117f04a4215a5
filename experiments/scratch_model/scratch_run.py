"""One seed of the proof after another, stage by stage; what is done already is not done again."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerBase

from experiments.scratch_model import scratch_base, scratch_results, scratch_training
from experiments.scratch_model.scratch_training import PROSE, WAYS

STAGES = ("base", "control", "thoughts")
NAMES = {"without": "w = 0", "thoughts": "thoughts", "shuffled": "shuffled"}  # of the model that thinks


@dataclass(frozen=True)
class Bench:
    """What every seed shares: recipes, tokenizer, tests, the folder with models and results."""

    folder: Path
    making: scratch_base.BaseRecipe
    recipe: scratch_training.Recipe
    tokenizer: PreTrainedTokenizerBase
    tests: dict[str, scratch_training.Unseen]
    settings: dict[str, Any]
    found: scratch_results.Results

    @classmethod
    def make(
        cls,
        folder: Path,
        making: scratch_base.BaseRecipe,
        recipe: scratch_training.Recipe,
        questions: int,
        texts: int,
    ) -> Bench:
        """Raises ValueError for results of other settings in the folder, and more texts than there are."""
        tokenizer = scratch_base.make_tokenizer()
        settings = {
            "base": asdict(making),
            **asdict(recipe),
            "questions": questions,
            "texts": texts,
            **asdict(scratch_training.thinking()),
        }
        tests = scratch_training.tests(tokenizer, questions, texts)
        found = scratch_results.Results(settings, folder / "results.jsonl")
        return cls(folder, making, recipe, tokenizer, tests, settings, found)

    def run(self, seed: int, stage: str) -> None:
        """Trains and tests what this stage of the seed is about, unless the results have it."""
        last = {"base": "base", "control": "control", "thoughts": NAMES[WAYS[-1]]}[stage]
        if self.found.has(seed, last, PROSE):
            return
        began = time.perf_counter()
        model = scratch_training.thinker(self._base(seed), self.tokenizer)
        hard = {kind: scratch_training.hard(model, test) for kind, test in self.tests.items()}
        ways: tuple[str, ...] = WAYS if stage == "thoughts" else ("without",)
        if stage != "base":
            thinks = stage == "thoughts"
            trained = scratch_training.train(self._base(seed), self.recipe, self.tokenizer, seed, thinks)
            model = trained if thinks else scratch_training.thinker(trained, self.tokenizer)
        if stage == "thoughts":
            model.save_pretrained(self.folder / f"thinks-{seed}")
            self.tokenizer.save_pretrained(self.folder / f"thinks-{seed}")
        names = NAMES if stage == "thoughts" else {"without": stage}
        lines = []
        for kind, test in self.tests.items():
            sums = scratch_training.measure(model, test, self.tokenizer, hard[kind], ways, seed)
            more = self._diagnostics(model, stage, test, seed)
            for way in ways:
                lines.append(
                    {"seed": seed, "condition": names[way], "kind": kind, "seconds": 0.0, **more, **sums[way]}
                )
        # the last one is that by which a later run knows that all are there
        lines.sort(key=lambda line: (line["condition"], line["kind"]) == (last, PROSE))
        lines[-1]["seconds"] = time.perf_counter() - began
        for line in lines:
            self.found.add(line)

    def _diagnostics(self, model, stage: str, test: scratch_training.Unseen, seed: int) -> dict[str, float]:
        if not test.questions or stage == "control":
            return {}
        return {
            "useful": scratch_training.useful_share(model, test, self.tokenizer, seed),
            "told": scratch_base.told_accuracy(model.base, self.tokenizer, test.kind, test.questions),
        }

    def _base(self, seed: int) -> LlamaForCausalLM:
        """The base model of this seed, made where it is not there yet."""
        name = hashlib.sha256(json.dumps(asdict(self.making), sort_keys=True).encode()).hexdigest()[:8]
        path = self.folder / f"base-{seed}-{name}"
        if not path.is_dir():
            begun = path.with_name(f"{path.name}.begun")
            shutil.rmtree(begun, ignore_errors=True)  # of a run that was cut short
            scratch_base.train(self.making, self.tokenizer, seed).save_pretrained(begun)
            self.tokenizer.save_pretrained(begun)
            begun.rename(path)
        return AutoModelForCausalLM.from_pretrained(path, dtype="float32")
