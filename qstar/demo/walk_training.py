"""Train the embedded model on walks without any aside (town.py), and test it on walks that it has never seen.

This is the paper's premise in miniature: a language model that saw others show their steps learns to think
silently.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from qstar.config import QuietStarConfig
from qstar.data import collate, encode
from qstar.demo import TINY_LM
from qstar.demo.town import PLACES, STEPS, Walk, walks
from qstar.evaluation.held_out import held_out
from qstar.generation import QuietStarGenerateOutput
from qstar.model import QuietStarForCausalLM
from qstar.training.trainer import QuietStarTrainer, ThoughtProgress

BATCH = 16
LEARNING_RATE, MIXING_LEARNING_RATE = 1e-4, 1e-3


def thinking(thought_length: int = STEPS, policy_weight: float = 1.0) -> QuietStarConfig:
    """Return the demo's settings of the method.

    The policy term enters with weight 1 and no temperature. `<start>` and `<end>` learn as slowly as the
    rest, since they begin as the dash, which the model knows already.
    """
    return QuietStarConfig(
        thought_length=thought_length,
        talk_length=2,
        num_thoughts=2,
        policy_weight=policy_weight,
        reinforce_temperature=1.0,
        start_token=" —",
        end_token=" —",
        boundary_scale=1.0,
    )


@dataclass(frozen=True)
class WalkTask:
    """Rows to train on, and unseen walks to test with.

    Token ids, int64: questions [walks, tokens], answers [walks], useful_thoughts [walks, STEPS], places [24].
    """

    tokenizer: PreTrainedTokenizerBase
    rows: list[dict]
    test: list[Walk]
    test_rows: list[dict]
    questions: Tensor
    answers: Tensor
    useful_thoughts: Tensor
    places: Tensor

    @classmethod
    def make(cls, seed: int, training_steps: int, test_walks: int) -> WalkTask:
        tokenizer = AutoTokenizer.from_pretrained(TINY_LM)
        test = walks(test_walks, seed="test", held_out=True)

        def rows(of: list[Walk]) -> list[dict]:
            documents = encode([walk.text() for walk in of], tokenizer)
            return [{"input_ids": ids, "position_ids": list(range(len(ids)))} for ids in documents]

        def ids(texts: list[str]) -> Tensor:
            return torch.tensor(tokenizer(texts)["input_ids"])

        return cls(
            tokenizer=tokenizer,
            rows=rows(walks(training_steps * BATCH, seed=f"train {seed}")),
            test=test,
            test_rows=rows(test),
            questions=ids([walk.question for walk in test]),
            answers=ids([f" {walk.answer}" for walk in test])[:, 0],
            useful_thoughts=ids([f" {walk.useful_thought}" for walk in test]),
            places=ids([f" {place}" for place in PLACES])[:, 0],
        )


def before(task: WalkTask, config: QuietStarConfig, base: str | Path = TINY_LM) -> QuietStarForCausalLM:
    """Load the embedded model, or one in another folder with the same tokenizer, ready to think (w = 0)."""
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    return QuietStarForCausalLM.from_base(loaded, config, tokenizer=task.tokenizer).eval()


def train(
    task: WalkTask, config: QuietStarConfig | None, seed: int, progress: bool = True
) -> PreTrainedModel:
    """Train the embedded model for one pass over the task's rows; config None is the control, which does not
    think."""
    set_seed(seed)
    if config is None:
        model = AutoModelForCausalLM.from_pretrained(TINY_LM, dtype="float32")
    else:
        model = before(task, config)
    return fit_rows(model, task.rows, seed, disable_tqdm=not progress)


def fit_rows(
    model: PreTrainedModel,
    rows: list[dict],
    seed: int,
    callbacks: list[TrainerCallback] | None = None,
    mixing_learning_rate: float = MIXING_LEARNING_RATE,
    boundary_learning_rate: float | None = None,
    **arguments: Any,
) -> PreTrainedModel:
    """Train a model, one that thinks or a plain one, and return it in evaluation mode.

    rows: as `collate` takes them. Unless `arguments`, those of `TrainingArguments`, say otherwise, it passes
    once over the rows, BATCH at a time, at a constant LEARNING_RATE.
    """
    demo = {"num_train_epochs": 1, "per_device_train_batch_size": BATCH, "learning_rate": LEARNING_RATE}
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "model": model,
            "args": TrainingArguments(
                output_dir=folder,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                seed=seed,
                use_cpu=True,
                **(demo | {"lr_scheduler_type": "constant", "disable_tqdm": False} | arguments),
            ),
            "train_dataset": rows,
            "data_collator": collate,  # the Trainer itself drops the columns that a model does not take
            "callbacks": callbacks,
        }
        trainer: Trainer
        if isinstance(model, QuietStarForCausalLM):
            trainer = QuietStarTrainer(
                mixing_learning_rate=mixing_learning_rate,
                boundary_learning_rate=boundary_learning_rate,
                **common,
            )
        else:
            trainer = Trainer(**common)
            if trainer.pop_callback(ProgressCallback) is not None:
                trainer.add_callback(ThoughtProgress())
        trainer.train()
    return model.eval()


@torch.no_grad()
def direct_accuracy(model: PreTrainedModel, task: WalkTask) -> float:
    """Return the share of unseen walks whose answer is the likeliest place right after the question (where
    the model thinks, after a greedy thought)."""
    if isinstance(model, QuietStarForCausalLM):
        result = _answers(model, task, thought_temperature=0.0, output_logits=True)
        assert result.logits is not None
        scores = result.logits[:, 0]
    else:
        scores = model(input_ids=task.questions).logits[:, -1]
    said = task.places[scores[:, task.places].argmax(-1)]
    return float((said == task.answers).float().mean())


def _answers(
    model: QuietStarForCausalLM, task: WalkTask, count: int | None = None, **options: Any
) -> QuietStarGenerateOutput:
    """Generate the token after each question, or as many as asked for."""
    options = {"max_new_tokens": 1, "eos_token_id": None, "pad_token_id": 0} | options
    return model.generate(task.questions[:count], return_dict_in_generate=True, **options)


def useful_share(model: QuietStarForCausalLM, task: WalkTask, seed: int = 0) -> float:
    """Return the share of thoughts, sampled at the end of the questions, that spell the whole walk out."""
    source = torch.Generator().manual_seed(seed)
    drawn = _answers(model, task, thought_length=STEPS, thought_temperature=1.0, generator=source)
    return float((drawn.thoughts[:, 0] == task.useful_thoughts).all(-1).float().mean())


def mixed_nll(model: QuietStarForCausalLM, task: WalkTask) -> float:
    """Return the mean NLL of the unseen walks' tokens with greedy thoughts, in nats."""
    return float(held_out(model, task.test_rows, batch_size=BATCH, progress=None).mixed_nll.mean())


def examples(model: QuietStarForCausalLM, task: WalkTask, count: int = 3) -> list[dict[str, str]]:
    """Generate the answers of the first unseen walks, with the thought before each."""
    result = _answers(model, task, count, max_new_tokens=2, thought_temperature=0.0)
    decode = task.tokenizer.decode
    return [
        {
            "question": walk.question,
            "thought": decode(thoughts[0]).strip(),
            "answer": decode(tokens).strip(),
            "right": walk.answer,
        }
        for walk, thoughts, tokens in zip(task.test, result.thoughts, result.new_tokens)
    ]
