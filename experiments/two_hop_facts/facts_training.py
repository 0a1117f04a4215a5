"""Training and testing of one condition of the proof: with the library's own Trainer, on the last layers."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from typing import Any

import torch
from qstar_kernels.vocabulary import logits
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from experiments.two_hop_facts.facts_task import Split
from qstar.base_model import in_eval_mode
from qstar.config import QuietStarConfig
from qstar.data import collate
from qstar.layout import TextRows, ThoughtLayout
from qstar.model import QuietStarForCausalLM
from qstar.training.trainer import QuietStarTrainer, ThoughtProgress


@dataclass(frozen=True)
class Recipe:
    """How every condition trains. The learning rates are those of the last layers, the mixing head and the
    boundary embeddings."""

    steps: int = 80
    batch: int = 24
    trainable_layers: int = 10
    learning_rate: float = 5e-5
    mixing_learning_rate: float = 1e-3
    boundary_learning_rate: float = 1e-2
    schedule: str = "linear"
    bf16: bool = False


def thinking(thought_length: int, **changes: Any) -> QuietStarConfig:
    """The method as this proof uses it: thoughts begin as if with " is", are written by the frozen base model
    and read by an additional loss of the prediction after them alone."""
    knobs: dict[str, Any] = {
        "thought_length": thought_length,
        "talk_length": 1,
        "num_thoughts": 1,  # without a policy there is nothing to compare them by
        "thought_temperature": 0.5,
        "start_token": " is",
        "end_token": "—",
        "boundary_scale": 1.0,
        "writer": "base",
        "policy_weight": 0.0,
        "base_weight": 0.0,
        "talk_weight": 1.0,
    }
    return QuietStarConfig(**(knobs | changes))


def train(
    path: str,
    split: Split,
    config: QuietStarConfig | None,
    recipe: Recipe,
    seed: int,
    callbacks: list[TrainerCallback] | None = None,
) -> QuietStarForCausalLM | PreTrainedModel:
    """The model of the folder `path` after training on the split; config None is the control, a plain
    language model that sees the same rows in the same order."""
    return fit(path, split.tokenizer, split.rows(split.train), config, recipe, seed, callbacks)


def fit(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, list[int]]],
    config: QuietStarConfig | None,
    recipe: Recipe,
    seed: int,
    callbacks: list[TrainerCallback] | None = None,
) -> QuietStarForCausalLM | PreTrainedModel:
    """The model of the folder `path` after training on rows, as `collate` takes them; config None is a plain
    language model."""
    set_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    # also of a plain one: it tells the last layers apart
    model = QuietStarForCausalLM.from_base(base, config or QuietStarConfig(), tokenizer=tokenizer)
    model.freeze_base(recipe.trainable_layers)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=recipe.steps,
            per_device_train_batch_size=recipe.batch,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type=recipe.schedule,
            weight_decay=0.0,
            adam_beta2=0.95,
            bf16=recipe.bf16,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=seed,
            use_cpu=True,
            disable_tqdm=False,
        )
        common: dict[str, Any] = {
            "args": arguments,
            "train_dataset": rows,
            "data_collator": collate,  # the Trainer drops the columns that a model does not take
            "callbacks": callbacks,
        }
        trainer: Trainer
        if config is None:
            trainer = Trainer(model=base, **common)
            trainer.remove_callback(ProgressCallback)
            trainer.add_callback(ThoughtProgress())
        else:
            trainer = QuietStarTrainer(
                model=model,
                mixing_learning_rate=recipe.mixing_learning_rate,
                boundary_learning_rate=recipe.boundary_learning_rate,
                **common,
            )
        trainer.train()
    return base if config is None else model


@dataclass(frozen=True)
class Answers:
    """Of every test fact: scores [N, 26], the logits of the letters; said [N], the thought as text."""

    scores: Tensor
    right: Tensor
    said: list[str]

    @property
    def correct(self) -> Tensor:
        """[N] bool: the likeliest letter is the right one."""
        return self.scores.argmax(-1) == self.right

    @property
    def nll(self) -> Tensor:
        """[N]: of the right letter among the letters, in nats."""
        return -self.scores.log_softmax(-1).gather(1, self.right[:, None]).squeeze(1)


@torch.no_grad()
def answers(model: QuietStarForCausalLM | PreTrainedModel, split: Split, seed: int = 0) -> dict[str, Answers]:
    """By condition of the test: of a plain model "plain"; of one that thinks "w = 0" (its own base
    prediction), "w = 1" (after the thought alone), "thoughts" (greedy, mixed) and "shuffled" (each thought
    with the question of another, mixed)."""
    batch = collate(split.rows(split.test))
    rows = TextRows.from_batch(batch["input_ids"], batch["attention_mask"], batch["position_ids"])
    right = torch.tensor([split.letters.index(split.letter(fact)) for fact in split.test])
    letters = torch.tensor(split.letters)
    with in_eval_mode(model):
        if not isinstance(model, QuietStarForCausalLM):
            scores = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            at = batch["think_mask"].argmax(1)
            return {"plain": Answers(scores[torch.arange(len(at)), at][:, letters], right, [""] * len(at))}
        config = replace(model.quiet_star, num_thoughts=1, thought_temperature=0.0)
        predicts = rows.predicts(batch["labels"])
        layout = ThoughtLayout.plan(rows, predicts, config, think_mask=batch["think_mask"])
        thinker = replace(model.thinker, config=config)
        hidden, text = thinker.read_text(batch["input_ids"], rows)

        def after(thoughts: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            thought = thinker.think(batch["input_ids"], hidden, text, layout, thoughts)
            base, talk = (
                logits(x[:, 0, 0, 0], model.linear_head())[:, letters]
                for x in (thought.base_hidden, thought.talk_hidden)
            )
            w = thought.mix_weight[:, 0, 0]
            return base, talk, (1 - w) * base + w * talk, thought.tokens

        base, talk, mixed, tokens = after(None)
        other = derangement(len(tokens), seed)
        shuffled = after(tokens[other])[2]
    said = split.tokenizer.batch_decode(tokens[:, 0, 0]) if tokens.shape[-1] else [""] * len(tokens)
    return {
        "w = 0": Answers(base, right, said),
        "w = 1": Answers(talk, right, said),
        "thoughts": Answers(mixed, right, said),
        "shuffled": Answers(shuffled, right, [said[i] for i in other.tolist()]),
    }


def derangement(count: int, seed: int) -> Tensor:
    """A random order in which nothing keeps its place: each thing goes to the next one of a random circle."""
    circle = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    other = torch.empty_like(circle)
    other[circle] = circle.roll(1)
    return other
