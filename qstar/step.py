"""One training step: from a batch to its loss and metrics.

Thoughts are read all at once, or, with `block_chunk`, some positions at a time under activation
checkpointing: blocks meet only in the keys and values of the prefix, so both give the same loss and
gradients, and the peak memory of the latter grows neither with thoughts nor with positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from qstar_kernels.vocabulary import (
    LinearHead,
    entropy,
    log_prob,
    mixed_nll,
    weighted_mixed_nll,
    weighted_nll,
)
from torch import Tensor, distributed
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from qstar import objective
from qstar.cache import TextKeysValues
from qstar.layout import IGNORE, TextRows, ThoughtLayout
from qstar.noise import rand
from qstar.phases import LOSS, phase

if TYPE_CHECKING:
    from qstar.model import QuietStarForCausalLM


@dataclass
class QuietStarOutput(ModelOutput):
    """loss: scalar, to call backward on; metrics: detached scalars by name; nll_loss, policy_loss: the two
    weighted parts of the loss, with their graph."""

    loss: Tensor | None = None
    metrics: dict[str, Tensor] | None = None
    nll_loss: Tensor | None = None
    policy_loss: Tensor | None = None


@dataclass(frozen=True)
class Thoughts:
    """What thinking gives, at the positions of `layout` (P of them, R thoughts at each, N = P * R).

    tokens [B, P, R, k] int64; slot_hidden [B, P, R, L, D], all slots after the final norm; talk_hidden
    [B, P, R, m, D], its last m; base_hidden [B, P, 1, m, D] of x_{t+j}; mix_weight [B, P, R, m] fp32.
    """

    layout: ThoughtLayout
    tokens: Tensor
    slot_hidden: Tensor
    talk_hidden: Tensor
    base_hidden: Tensor
    mix_weight: Tensor


@dataclass(frozen=True)
class _Scores:
    """What the thoughts' part of the loss is made of: mixed_loss and policy with their graph; mixed (NLLs),
    mix_weight [B, P, R, m], reward and advantage [B, P, R] without."""

    mixed_loss: Tensor
    policy: Tensor
    mixed: Tensor
    mix_weight: Tensor
    reward: Tensor
    advantage: Tensor


@dataclass(frozen=True)
class _Share:
    """How much of the whole batch's loss the means of this part of it are: factors of the base NLL, the mixed
    NLL and the policy loss; items: of `objective.mixed_weights`."""

    base: Tensor | float = 1.0
    mixed: Tensor | float = 1.0
    policy: Tensor | float = 1.0
    items: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, whole: Tensor | int | None, rows: TextRows, labels: Tensor, talk_length: int) -> _Share:
        """whole: `num_items_in_batch` of `QuietStarForCausalLM.forward`."""
        if whole is None:
            return cls()
        if not isinstance(whole, Tensor) or whole.numel() == 1:
            share = (labels[:, 1:] != IGNORE).sum() / whole
            return cls(share, share, share)
        if whole.shape != (talk_length + 2,):
            raise ValueError(
                f"num_items_in_batch has shape {tuple(whole.shape)}: must be one number, the targets, or "
                f"{(talk_length + 2,)}, the sum of `count_items` over the parts of the batch"
            )
        own = rows.items(labels, talk_length)
        whole = whole.to(own.device)
        share = own / whole.clamp(min=1)
        return cls(base=share[0], policy=share[-1], items=(own[1:-1], whole[1:-1]))


# base hidden, thought hidden, w, head, targets: of `mixed_nll`
_Mixture = tuple[Tensor, Tensor, Tensor, LinearHead, Tensor]


@dataclass(frozen=True)
class _Step:
    """A batch after the pass over its text; next_label [B, T]: the target of each position, 0 where it has
    none; base_nll [B, T] fp32 without gradient; thoughts [B, P, R, k] that are given, or the numbers uniform
    [k, B, P * R] to sample them by."""

    model: QuietStarForCausalLM
    head: LinearHead
    input_ids: Tensor
    text_hidden: Tensor
    text: TextKeysValues
    next_label: Tensor
    base_nll: Tensor
    share: _Share
    thoughts: Tensor | None
    uniform: Tensor | None

    def at(self, values: Tensor, layout: ThoughtLayout) -> Tensor:
        """[B, T] -> [B, P, 1, m] at the tokens whose prediction is mixed."""
        B, P, m = layout.talk_index.shape
        return values.gather(1, layout.talk_index.flatten(1)).view(B, P, 1, m)

    def tokens(self, part: ThoughtLayout, at: slice) -> Tensor:
        """The thoughts [B, p, R, k] of a part of the layout, its positions `at`."""
        if self.thoughts is not None:
            return self.thoughts[:, at]
        blocks = slice(at.start * part.num_thoughts, at.stop * part.num_thoughts)
        own = self.uniform[:, :, blocks]  # type: ignore[index]
        return self.model.sample_thoughts(self.text, part, self.model.quiet_star, uniform=own)

    def read(self, layout: ThoughtLayout, thoughts: Tensor) -> Thoughts:
        return self.model.read_thoughts(
            self.input_ids, self.text_hidden, self.text, layout, thoughts, self.model.quiet_star
        )

    def mixture(self, thought: Thoughts) -> tuple[Tensor, _Mixture, Callable[[Tensor], Tensor]]:
        """(every [B, P, R, m] bool, what `mixed_nll` takes at those, how to lay out what it gives)."""
        layout, (B, P, R, m) = thought.layout, thought.mix_weight.shape
        every = layout.target_valid[:, :, None].expand(B, P, R, m)
        operands = (
            thought.base_hidden.expand(B, P, R, m, -1)[every],
            thought.talk_hidden[every],
            thought.mix_weight[every],
            self.head,
            self.at(self.next_label, layout).expand(B, P, R, m)[every],
        )
        return every, operands, lambda x: x.new_zeros(every.shape).masked_scatter(every, x)

    def reward(self, layout: ThoughtLayout, mixed: Tensor) -> Tensor:
        return objective.reward(self.at(self.base_nll, layout), mixed, layout.target_valid[:, :, None])

    def written(self, thought: Thoughts, chosen: Tensor) -> dict:
        """What the policy's NLL of the chosen thoughts [B, P, R] bool takes: slot i predicts c_{i+1}."""
        k = thought.tokens.shape[-1]
        return {
            "hidden": thought.slot_hidden[..., :k, :][chosen].flatten(0, 1),
            "head": self.head,
            "temperature": self.model.quiet_star.reinforce_temperature,
            "suppress": self.model.suppress,
        }


def training_step(
    model: QuietStarForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    generator: torch.Generator | None = None,
    position_ids: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    thoughts: Tensor | None = None,
) -> QuietStarOutput:
    """See `QuietStarForCausalLM.forward`."""
    config = model.quiet_star
    rows = TextRows.from_batch(input_ids, attention_mask, position_ids)
    labels = rows.labels(input_ids, labels)
    predicts = rows.predicts(labels)
    if not bool(predicts.any()):
        raise ValueError("labels: there is no target in this batch; every label is -100 or first of its text")
    head = model.head
    text_hidden, text = model.read_text(input_ids, rows)

    next_label = torch.where(predicts, labels.roll(-1, dims=1), 0)
    targets = next_label[predicts]
    mean = torch.full(targets.shape, 1 / len(targets), device=targets.device)
    with phase(LOSS):
        base_loss, flat = weighted_nll(text_hidden[predicts], head, targets, mean)
    base_nll = flat.new_zeros(predicts.shape).masked_scatter(predicts, flat)
    unsure = None
    if config.thinking_positions == "uncertain":
        candidate = rows.scored(predicts, config.talk_length).any(-1)
        with torch.no_grad():
            unsure = flat.new_zeros(predicts.shape).masked_scatter(
                candidate, entropy(text_hidden[candidate], head)
            )
    layout = ThoughtLayout.plan(rows, predicts, config, entropy=unsure, generator=generator)
    share = _Share.of(num_items_in_batch, rows, labels, config.talk_length)
    uniform = None
    if thoughts is None:
        # for all chunks at once: the thoughts do not depend on the chunks
        B, N = layout.prefix_end.shape
        uniform = rand(config.thought_length, B, N, generator, text_hidden.device, torch.float64)
    step = _Step(model, head, input_ids, text_hidden, text, next_label, base_nll, share, thoughts, uniform)
    if config.chunk_positions is None:
        scores = _all_at_once(step, layout)
    else:
        scores = _by_chunks(step, layout, config.chunk_positions)

    mixed_loss = share.mixed * (1 - config.base_weight) * scores.mixed_loss
    nll_loss = share.base * config.base_weight * base_loss + mixed_loss
    policy_loss = share.policy * config.policy_weight * scores.policy
    return QuietStarOutput(
        loss=nll_loss + policy_loss,
        metrics=_metrics(base_loss, scores, layout),
        nll_loss=nll_loss,
        policy_loss=policy_loss,
    )


def _all_at_once(step: _Step, layout: ThoughtLayout) -> _Scores:
    """The weights of every NLL are known when it is made, so one pass over its logits gives gradients too."""
    config = step.model.quiet_star
    thoughts = step.tokens(layout, slice(0, layout.positions.shape[1]))
    thought = step.read(layout, thoughts)
    with phase(LOSS):
        every, operands, laid_out = step.mixture(thought)
        valid = layout.target_valid[:, :, None]
        weights = objective.mixed_weights(valid, layout.num_thoughts, step.share.items)[every]
        mixed_loss, mixed = weighted_mixed_nll(*operands, weights)
        mixed = laid_out(mixed)
        reward = step.reward(layout, mixed)
        advantage = objective.advantage(reward, layout.rewarded, config.normalize_advantages)
        # the other thoughts add exactly zero
        chosen = advantage > 0
        token_weights = objective.policy_weights(advantage[chosen], config.thought_length, _rewarded(layout))
        policy, _ = weighted_nll(
            **step.written(thought, chosen),
            targets=thoughts[chosen].flatten(),
            weights=token_weights.repeat_interleave(config.thought_length),
        )
    return _Scores(mixed_loss, policy, mixed, thought.mix_weight.detach(), reward, advantage)


def _by_chunks(step: _Step, layout: ThoughtLayout, positions: int) -> _Scores:
    """Thoughts are sampled and scored `positions` positions at a time; of a chunk only numbers stay, a few
    for each thought, and backward makes the rest again."""
    config = step.model.quiet_star

    def score(part: ThoughtLayout, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(mixed NLL, w [B, p, R, m]; log-probability of each thought that gains [B, p, R], else 0)."""
        thought = step.read(part, tokens)
        with phase(LOSS):
            _, operands, laid_out = step.mixture(thought)
            mixed = laid_out(mixed_nll(*operands))
            chosen = objective.advantage(step.reward(part, mixed.detach()), part.rewarded) > 0
            written = tokens[chosen]  # [thoughts that gain, k]
            each = log_prob(**step.written(thought, chosen), tokens=written.flatten())
            log_p = each.new_zeros(chosen.shape).masked_scatter(chosen, each.view(written.shape).sum(-1))
        return mixed, thought.mix_weight, log_p

    chunks = list(layout.chunks(positions))
    missing = _most_of_all_processes(step.model, chunks=len(chunks)) - len(chunks)
    found = [
        checkpoint(score, part, step.tokens(part, at), use_reentrant=False)
        for at, part in (*chunks, *chunks[-1:] * missing)
    ]
    # that of the repeated chunks is never used, but backward must read them again, too
    unused = sum(0 * x.sum() for repeated in found[len(chunks) :] for x in repeated)
    mixed, mix_weight, log_p = (torch.cat(x, dim=1) for x in zip(*found[: len(chunks)]))
    with phase(LOSS):
        mixed_loss, _ = objective.mixed_loss(mixed, layout.target_valid[:, :, None], step.share.items)
        mixed_loss = mixed_loss + unused
        reward = step.reward(layout, mixed.detach())
        advantage = objective.advantage(reward, layout.rewarded, config.normalize_advantages)
        weights = objective.policy_weights(advantage, config.thought_length, _rewarded(layout))
        policy = -(weights * log_p).sum()
    return _Scores(mixed_loss, policy, mixed.detach(), mix_weight.detach(), reward, advantage)


def _most_of_all_processes(model: QuietStarForCausalLM, chunks: int) -> int:
    """Sharded layers are gathered by all processes together, so all must read as many chunks."""
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        return chunks
    most = torch.tensor(chunks, device=model.suppress.device)
    distributed.all_reduce(most, distributed.ReduceOp.MAX)
    return int(most)


def _rewarded(layout: ThoughtLayout) -> Tensor:
    """The number of thoughts that the policy loss is a mean over."""
    return layout.rewarded.sum() * layout.num_thoughts


@torch.no_grad()
def _metrics(base_loss: Tensor, scores: _Scores, layout: ThoughtLayout) -> dict[str, Tensor]:
    valid = layout.target_valid[:, :, None]
    rewarded = layout.rewarded[..., None].expand(scores.reward.shape)
    mixed_loss, steps = objective.mixed_loss(scores.mixed, valid)
    reward_mean, reward_std = objective.spread(scores.reward, rewarded)
    weight_mean, weight_std = objective.spread(scores.mix_weight, valid.expand(scores.mixed.shape))
    return {
        "base_nll": base_loss.detach(),
        "mixed_nll": mixed_loss,
        **{f"mixed_nll_{j + 1}": step for j, step in enumerate(steps)},
        "reward_mean": reward_mean,
        "reward_std": reward_std,
        "mix_weight_mean": weight_mean,
        "mix_weight_std": weight_std,
        "policy_loss": scores.policy.detach(),
        "positive_advantages": objective.masked_mean((scores.advantage > 0).float(), rewarded),
        "thoughts": layout.valid.sum() * layout.num_thoughts,
    }
