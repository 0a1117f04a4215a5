"""Do one run of the learning curves: train the embedded model, or one that saw more or fewer useful asides,
with one setting of the method, and measure it on the way."""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    TrainerCallback,
    set_seed,
)

from experiments.shared.comparison import Row
from experiments.shared.small_llama import made_once
from experiments.tiny_lm.tiny_lm_training import TinyLmArguments
from experiments.tiny_lm.tiny_lm_training import train as train_tiny_lm
from qstar.base_model import in_eval_mode
from qstar.config import QuietStarConfig
from qstar.demo import TINY_LM, walk_training
from qstar.demo.town import STEPS
from qstar.evaluation.held_out import held_out
from qstar.model import QuietStarForCausalLM
from qstar.reporting.benchmark_record import machine

MOMENTS = (0.06, 0.12, 0.2, 0.3, 0.4, 0.6, 1.0)  # shares of the training steps after which to measure
NLL_WALKS = 50  # of the test walks: a thought before every token costs more than one before the answer
BASE_LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Setting:
    """What differs between runs; the rest is the demo's. boundary: what `<start>` and `<end>` begin from,
    "dash" or "random"; useful_share: of the asides that the base model saw, None: the embedded model;
    longer: factor of the training steps."""

    thought_length: int = STEPS
    num_thoughts: int = 2
    policy_weight: float = 1.0
    reinforce_temperature: float = 1.0
    boundary: str = "dash"
    boundary_scale: float = 1.0
    useful_share: float | None = None
    longer: int = 1

    def config(self) -> QuietStarConfig:
        knobs = ("thought_length", "num_thoughts", "policy_weight", "reinforce_temperature", "boundary_scale")
        return replace(walk_training.thinking(), **{name: getattr(self, name) for name in knobs})


@dataclass(frozen=True)
class Size:
    """How large a run is: optimiser steps, unseen walks to test with, and steps in which the base model sees
    its share of useful asides."""

    training_steps: int
    test_walks: int
    base_steps: int


def base_model(share: float | None, steps: int, folder: Path) -> Path:
    """Return the folder of the base model: the embedded model, or, with a share, that one after `steps` more
    on walks alone, half of which have an aside, and `share` of these a useful one."""
    if share is None:
        return TINY_LM
    options = TinyLmArguments(
        prose="",
        prose_share=0.0,
        steps_common=0,
        steps_rare=steps,
        useful_share=share,
        learning_rate=BASE_LEARNING_RATE,
    )
    tokenizer = AutoTokenizer.from_pretrained(TINY_LM)

    def make() -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(TINY_LM, dtype="float32")
        return train_tiny_lm(model, options, tokenizer, prose="")

    return made_once(folder / f"useful-{share}-steps-{steps}", make, tokenizer)


def run_key(row: Row) -> tuple[Setting, Size, int]:
    """Tell a run from the others."""
    return Setting(**row["setting"]), Size(**row["size"]), row["seed"]


@torch.no_grad()
def begin_from_noise(model: QuietStarForCausalLM, seed: int) -> None:
    """Set `<start>` and `<end>` to random vectors, as large as the mean token embedding."""
    table = model.base.get_input_embeddings().weight
    source = torch.Generator().manual_seed(seed)
    start, end = torch.randn(2, table.shape[1], generator=source) * table.square().mean().sqrt()
    model.boundary.begin_from(start, end)


@torch.no_grad()
def told_accuracy(base: PreTrainedModel, task: walk_training.WalkTask) -> float:
    """Return the share of unseen walks whose answer is the likeliest place after the useful aside."""
    texts = [walk.text(walk.useful_thought) for walk in task.test]
    ids = torch.tensor(task.tokenizer(texts)["input_ids"])
    scores = base(input_ids=ids).logits[:, -3, task.places]  # before the answer and its full stop
    return float((task.places[scores.argmax(-1)] == task.answers).float().mean())


class Watch(TrainerCallback):
    """Measure the model before the first step and after those of `at`; points: what it measured."""

    def __init__(self, model: QuietStarForCausalLM, task: walk_training.WalkTask, at: Iterable[int]):
        self.points: list[dict[str, float]] = []
        self._model, self._task, self._at = model, task, set(at)
        self._rewards: list[float] = []
        self._look(0)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward_mean" in logs:
            self._rewards.append(logs["reward_mean"])
            if state.global_step in self._at:
                self._look(state.global_step)

    def _look(self, step: int) -> None:
        model, task, rewards = self._model, self._task, self._rewards
        # training draws its thoughts from torch's global generator, which measuring must not move
        with in_eval_mode(model), torch.random.fork_rng():
            text = held_out(model, task.test_rows[:NLL_WALKS], batch_size=walk_training.BATCH)
            seen = {
                "direct_accuracy": walk_training.direct_accuracy(model, task),
                "useful_share": walk_training.useful_share(model, task),
                "base_nll": float(text.base_nll.mean()),
                "mixed_nll": float(text.mixed_nll.mean()),
                "mix_weight": float(text.mix_weight.mean()),
            }
        if rewards:
            seen["reward"] = sum(rewards) / len(rewards)
        self.points.append({"step": step} | {name: round(value, 5) for name, value in seen.items()})
        self._rewards = []


def moments(training_steps: int) -> list[int]:
    """Return the steps after which to measure."""
    return sorted({max(1, round(share * training_steps)) for share in MOMENTS})


def run(setting: Setting, seed: int, size: Size, bases: Path) -> Row:
    """Train with one setting, and return the row of the run. Its points have direct_accuracy and
    useful_share (see `qstar.demo.walk_training`); base_nll, mixed_nll (nats a token) and mix_weight with
    greedy thoughts, on the first NLL_WALKS unseen walks; reward, the mean of the training batches since the
    point before."""
    began = time.perf_counter()
    base = base_model(setting.useful_share, size.base_steps, bases)
    steps = size.training_steps * setting.longer
    task = walk_training.WalkTask.make(seed, steps, size.test_walks)
    set_seed(seed)
    model = walk_training.before(task, setting.config(), base)
    told = told_accuracy(model.base, task)
    if setting.boundary == "random":
        begin_from_noise(model, seed)
    watch = Watch(model, task, moments(steps))
    walk_training.fit_rows(model, task.rows, seed, callbacks=[watch])
    return {
        "setting": asdict(setting),
        "size": asdict(size),
        "seed": seed,
        "told_accuracy": round(told, 5),
        "points": watch.points,
        "seconds": round(time.perf_counter() - began, 1),
        "machine": machine("cpu"),
    }
