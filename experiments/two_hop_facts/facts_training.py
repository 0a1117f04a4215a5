"""Set the method up for this study, and test a model on facts that it has not seen."""

from dataclasses import dataclass, replace

import torch
from qstar_kernels.vocabulary import logits
from torch import Tensor
from transformers import PreTrainedModel

from experiments.two_hop_facts.facts_task import Split
from qstar.base_model import in_eval_mode
from qstar.config import QuietStarConfig
from qstar.data import collate
from qstar.layout import TextRows, ThoughtLayout
from qstar.model import QuietStarForCausalLM


def thinking(thought_length: int) -> QuietStarConfig:
    """Return this study's settings of the method: thoughts begin as if with " is", are written by the frozen
    base model, and are read by an additional loss of the prediction after them alone."""
    return QuietStarConfig(
        thought_length=thought_length,
        talk_length=1,
        num_thoughts=1,  # without a policy there is nothing to compare them by
        thought_temperature=0.5,
        start_token=" is",
        end_token="—",
        boundary_scale=1.0,
        writer="base",
        policy_weight=0.0,
        base_weight=0.0,
        talk_weight=1.0,
    )


@dataclass(frozen=True)
class Answers:
    """Answers to all test facts: scores [N, 26], the logits of the letters; right [N] int64; said [N], the
    thoughts as text."""

    scores: Tensor
    right: Tensor
    said: list[str]

    @property
    def correct(self) -> Tensor:
        """Mark, in [N] bool, where the likeliest letter is the right one."""
        return self.scores.argmax(-1) == self.right

    @property
    def nll(self) -> Tensor:
        """Return the NLL [N] of the right letter among the letters, in nats."""
        return -self.scores.log_softmax(-1).gather(1, self.right[:, None]).squeeze(1)


@torch.no_grad()
def answers(model: PreTrainedModel, split: Split, seed: int = 0) -> dict[str, Answers]:
    """Answer the test facts, by condition of the test: of a plain model "plain"; of one that thinks "w = 0"
    (its own base prediction), "w = 1" (after the thought alone), "thoughts" (greedy, mixed) and "shuffled"
    (each thought with another question, mixed)."""
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
    """Draw an order in which nothing keeps its place: each thing goes to the next one of a random circle."""
    circle = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    other = torch.empty_like(circle)
    other[circle] = circle.roll(1)
    return other
