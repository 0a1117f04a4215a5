"""Run one training step: from a batch to its loss and metrics.

Thoughts are read all at once or, with `block_chunk`, some positions at a time under activation checkpointing.
Blocks meet only in the K/V of the prefix, so both give the same loss and gradients; with chunks, peak memory
grows neither with thoughts nor with positions. Legend: B rows, T tokens in a row, P thinking positions in a
row, R thoughts per position, k thought tokens, m talk tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from qstar_kernels.vocabulary import (
    LinearHead,
    entropy,
    log_prob,
    mixed_nll,
    nll,
    weighted_mixed_nll,
    weighted_nll,
)
from torch import Tensor, distributed
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from qstar import objective
from qstar.config import QuietStarConfig
from qstar.distributed_random import rand
from qstar.kv_cache import TextKeysValues
from qstar.layout import IGNORE, TextRows, ThoughtLayout
from qstar.profiler_ranges import LOSS, phase
from qstar.thinker import Thinker, Thoughts

# targets that are predicted after the thought alone where that enters no loss, for the metric talk_gain
TALK_TARGETS = 256


@dataclass
class QuietStarOutput(ModelOutput):
    """Hold what `forward` returns: loss, the scalar to call backward on; metrics, detached scalars by name;
    nll_loss and policy_loss, the two weighted parts of the loss, with their graph."""

    loss: Tensor | None = None
    metrics: dict[str, Tensor] | None = None
    nll_loss: Tensor | None = None
    policy_loss: Tensor | None = None


@dataclass(frozen=True)
class _Scores:
    """The thoughts' part of the loss and its metrics.

    mixed_loss, talk_loss, policy: scalars with their graph; without it: mixed, talk (NLL in nats; talk is NaN
    where it was not computed) and mix_weight [B, P, R, m], reward and advantage [B, P, R].
    """

    mixed_loss: Tensor
    talk_loss: Tensor
    policy: Tensor
    mixed: Tensor
    talk: Tensor
    mix_weight: Tensor
    reward: Tensor
    advantage: Tensor


@dataclass(frozen=True)
class _Share:
    """The weight of this part of a batch in the loss of the whole: factors of the base NLL, the mixed NLL and
    the policy loss; items: see `objective.mixed_weights`."""

    base: Tensor | float = 1.0
    mixed: Tensor | float = 1.0
    policy: Tensor | float = 1.0
    items: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(
        cls,
        whole: Tensor | int | None,
        rows: TextRows,
        labels: Tensor,
        think_mask: Tensor | None,
        talk_length: int,
    ) -> _Share:
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
        own = rows.items(labels, talk_length, think_mask)
        whole = whole.to(own.device)
        share = own / whole.clamp(min=1)
        return cls(base=share[0], policy=share[-1], items=(own[1:-1], whole[1:-1]))


# the arguments of `mixed_nll`: base hidden, thought hidden, w, head, targets
_Mixture = tuple[Tensor, Tensor, Tensor, LinearHead, Tensor]


@dataclass(frozen=True)
class _Step:
    """A batch whose text has been read.

    text_hidden [B, T, D] and text: from `Thinker.read_text`; next_label [B, T] int64: the target of each
    position, 0 where it has none; base_nll [B, T] fp32 nats, without gradient; talk_stride: one in so many
    targets is also predicted after the thought alone; write: (part of the layout, its positions) -> its
    thoughts [B, p, R, k].
    """

    thinker: Thinker
    head: LinearHead
    input_ids: Tensor
    text_hidden: Tensor
    text: TextKeysValues
    next_label: Tensor
    base_nll: Tensor
    talk_stride: int
    share: _Share
    write: Callable[[ThoughtLayout, slice], Tensor]

    @property
    def config(self) -> QuietStarConfig:
        return self.thinker.config

    def at(self, values: Tensor, layout: ThoughtLayout) -> Tensor:
        """Gather values [B, T] at the tokens whose prediction is mixed: [B, P, 1, m]."""
        B, P, m = layout.talk_index.shape
        return values.gather(1, layout.talk_index.flatten(1)).view(B, P, 1, m)

    def read(self, layout: ThoughtLayout, thoughts: Tensor) -> Thoughts:
        return self.thinker.read_thoughts(self.input_ids, self.text_hidden, self.text, layout, thoughts)

    def mixture(self, thought: Thoughts) -> tuple[Tensor, _Mixture, Callable[[Tensor], Tensor]]:
        """Choose the mixed predictions that have a target: (which, [B, P, R, m] bool; the arguments of
        `mixed_nll` there; the function that lays its result out again)."""
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

    def talk_nll(self, every: Tensor, operands: _Mixture) -> Tensor:
        """Return the NLL after the thought alone [B, P, R, m], with gradient where it enters the loss; NaN
        where it is not computed."""
        _, talk_hidden, _, head, targets = operands
        looked = slice(None, None, self.talk_stride)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.talk_weight > 0):
            found = nll(talk_hidden[looked], head, targets[looked])
        flat = found.new_full(targets.shape, torch.nan)
        flat[looked] = found
        return found.new_full(every.shape, torch.nan).masked_scatter(every, flat)

    def talk_loss(self, talk: Tensor, layout: ThoughtLayout) -> Tensor:
        if not self.config.talk_weight:
            return talk.new_zeros(())
        return objective.mixed_loss(talk, layout.target_valid[:, :, None], self.share.items)[0]

    def reward(self, layout: ThoughtLayout, mixed: Tensor) -> Tensor:
        return objective.reward(self.at(self.base_nll, layout), mixed, layout.target_valid[:, :, None])

    def written(self, thought: Thoughts, chosen: Tensor) -> dict:
        """Return the arguments of the policy's NLL of the chosen thoughts [B, P, R] bool: slot i predicts
        c_{i+1}."""
        k = thought.tokens.shape[-1]
        return {
            "hidden": thought.slot_hidden[..., :k, :][chosen].flatten(0, 1),
            "head": self.head,
            "temperature": self.config.reinforce_temperature,
            "suppress": self.thinker.suppress,
        }


def training_step(
    thinker: Thinker,
    input_ids: Tensor,
    rows: TextRows,
    labels: Tensor,
    generator: torch.Generator | None = None,
    num_items_in_batch: Tensor | int | None = None,
    thoughts: Tensor | None = None,
    think_mask: Tensor | None = None,
) -> QuietStarOutput:
    """Read the text, write thoughts, read them, and score all of it; arguments as of
    `QuietStarForCausalLM.forward`, with the texts of its rows and their labels [B, T]."""
    config = thinker.config
    predicts = rows.predicts(labels)
    if not bool(predicts.any()):
        raise ValueError("labels: there is no target in this batch; every label is -100 or first of its text")
    text_hidden, text = thinker.read_text(input_ids, rows)

    head = thinker.linear_head()
    next_label = torch.where(predicts, labels.roll(-1, dims=1), 0)
    targets = next_label[predicts]
    mean = torch.full(targets.shape, 1 / len(targets), device=targets.device)
    with phase(LOSS):
        base_loss, flat = weighted_nll(text_hidden[predicts], head, targets, mean)
    base_nll = flat.new_zeros(predicts.shape).masked_scatter(predicts, flat)
    unsure = None
    if config.thinking_positions == "uncertain" and think_mask is None:
        candidate = rows.scored(predicts, config.talk_length).any(-1)
        with torch.no_grad():
            unsure = flat.new_zeros(predicts.shape).masked_scatter(
                candidate, entropy(text_hidden[candidate], head)
            )
    layout = ThoughtLayout.plan(
        rows, predicts, config, entropy=unsure, generator=generator, think_mask=think_mask
    )
    targets_in_all = layout.num_thoughts * int(layout.target_valid.sum())
    stride = 1 if config.talk_weight else -(-targets_in_all // TALK_TARGETS)
    share = _Share.of(num_items_in_batch, rows, labels, think_mask, config.talk_length)
    write = (
        _taking(thoughts) if thoughts is not None else _sampling(thinker, input_ids, text, layout, generator)
    )
    step = _Step(thinker, head, input_ids, text_hidden, text, next_label, base_nll, stride, share, write)
    if config.chunk_positions is None:
        scores = _all_at_once(step, layout)
    else:
        scores = _by_chunks(step, layout, config.chunk_positions)

    nll_loss = share.base * config.base_weight * base_loss
    nll_loss = nll_loss + share.mixed * (1 - config.base_weight) * scores.mixed_loss
    nll_loss = nll_loss + share.mixed * config.talk_weight * scores.talk_loss
    policy_loss = share.policy * config.policy_weight * scores.policy
    return QuietStarOutput(
        loss=nll_loss + policy_loss,
        metrics=_metrics(base_loss, scores, layout, step.at(base_nll, layout)),
        nll_loss=nll_loss,
        policy_loss=policy_loss,
    )


def _taking(thoughts: Tensor) -> Callable[[ThoughtLayout, slice], Tensor]:
    return lambda part, at: thoughts[:, at]


def _sampling(
    thinker: Thinker,
    input_ids: Tensor,
    text: TextKeysValues,
    layout: ThoughtLayout,
    generator: torch.Generator | None,
) -> Callable[[ThoughtLayout, slice], Tensor]:
    k, (B, N), R = thinker.config.thought_length, layout.prefix_end.shape, layout.num_thoughts
    # drawn for all chunks at once: the thoughts do not depend on the chunks
    uniform = rand(k, B, N, generator, input_ids.device, torch.float64)
    written_on = thinker.authors_text(input_ids, layout.rows, text)

    def write(part: ThoughtLayout, at: slice) -> Tensor:
        return thinker.sample_thoughts(written_on, part, uniform=uniform[:, :, at.start * R : at.stop * R])

    return write


def _all_at_once(step: _Step, layout: ThoughtLayout) -> _Scores:
    """Score all thoughts in one pass. Every NLL's weight is known before it is computed, so one pass over its
    logits gives its gradients too."""
    config = step.config
    thoughts = step.write(layout, slice(0, layout.positions.shape[1]))
    thought = step.read(layout, thoughts)
    with phase(LOSS):
        every, operands, laid_out = step.mixture(thought)
        valid = layout.target_valid[:, :, None]
        weights = objective.mixed_weights(valid, layout.num_thoughts, step.share.items)[every]
        mixed_loss, mixed = weighted_mixed_nll(*operands, weights)
        mixed = laid_out(mixed)
        talk = step.talk_nll(every, operands)
        reward = step.reward(layout, mixed)
        advantage = objective.advantage(reward, layout.rewarded, config.advantage)
        # the other thoughts add exactly zero
        chosen = (advantage > 0) & (config.policy_weight > 0)
        token_weights = objective.policy_weights(advantage[chosen], config.thought_length, _rewarded(layout))
        policy, _ = weighted_nll(
            **step.written(thought, chosen),
            targets=thoughts[chosen].flatten(),
            weights=token_weights.repeat_interleave(config.thought_length),
        )
    talk_loss = step.talk_loss(talk, layout)
    return _Scores(
        mixed_loss, talk_loss, policy, mixed, talk.detach(), thought.mix_weight.detach(), reward, advantage
    )


def _by_chunks(step: _Step, layout: ThoughtLayout, positions: int) -> _Scores:
    """Score the thoughts of `positions` positions at a time. Of a chunk a few numbers per thought stay;
    backward computes the rest again."""
    config = step.config

    def score(part: ThoughtLayout, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(mixed NLL, NLL after the thought alone, w, each [B, p, R, m]; log-probability [B, p, R] of each
        thought that gains, else 0)."""
        thought = step.read(part, tokens)
        with phase(LOSS):
            every, operands, laid_out = step.mixture(thought)
            mixed, talk = laid_out(mixed_nll(*operands)), step.talk_nll(every, operands)
            chosen = objective.advantage(step.reward(part, mixed.detach()), part.rewarded) > 0
            chosen &= config.policy_weight > 0
            written = tokens[chosen]  # [thoughts that gain, k]
            each = log_prob(**step.written(thought, chosen), tokens=written.flatten())
            log_p = each.new_zeros(chosen.shape).masked_scatter(chosen, each.view(written.shape).sum(-1))
        return mixed, talk, thought.mix_weight, log_p

    chunks = list(layout.chunks(positions))
    missing = _most_of_all_processes(step.thinker, chunks=len(chunks)) - len(chunks)
    found = [
        checkpoint(score, part, step.write(part, at), use_reentrant=False)
        for at, part in (*chunks, *chunks[-1:] * missing)
    ]
    # the repeated chunks count for nothing, but backward must read them again with the other processes
    unused = sum(0 * mixed.sum() for mixed, *_ in found[len(chunks) :])
    mixed, talk, mix_weight, log_p = (torch.cat(x, dim=1) for x in zip(*found[: len(chunks)]))
    with phase(LOSS):
        mixed_loss, _ = objective.mixed_loss(mixed, layout.target_valid[:, :, None], step.share.items)
        mixed_loss = mixed_loss + unused
        reward = step.reward(layout, mixed.detach())
        advantage = objective.advantage(reward, layout.rewarded, config.advantage)
        weights = objective.policy_weights(advantage, config.thought_length, _rewarded(layout))
        policy = -(weights * log_p).sum()
        talk_loss = step.talk_loss(talk, layout)
    return _Scores(
        mixed_loss, talk_loss, policy, mixed.detach(), talk.detach(), mix_weight.detach(), reward, advantage
    )


def _most_of_all_processes(thinker: Thinker, chunks: int) -> int:
    """Return the most chunks that any process has: all gather sharded layers together, so all must read as
    many chunks."""
    if not any(isinstance(module, FSDPModule) for module in thinker.modules()):
        return chunks
    most = torch.tensor(chunks, device=thinker.suppress.device)
    distributed.all_reduce(most, distributed.ReduceOp.MAX)
    return int(most)


def _rewarded(layout: ThoughtLayout) -> Tensor:
    """Count the thoughts that the policy loss is a mean over."""
    return layout.rewarded.sum() * layout.num_thoughts


@torch.no_grad()
def _metrics(
    base_loss: Tensor, scores: _Scores, layout: ThoughtLayout, base_nll: Tensor
) -> dict[str, Tensor]:
    """Summarise a step; base_nll [B, P, 1, m] in nats, of the tokens that are predicted after a thought."""
    valid = layout.target_valid[:, :, None]
    every = valid.expand(scores.mixed.shape)
    looked = every & ~scores.talk.isnan()
    rewarded = layout.rewarded[..., None].expand(scores.reward.shape)
    mixed_loss, steps = objective.mixed_loss(scores.mixed, valid)
    reward_mean, reward_std = objective.spread(scores.reward, rewarded)
    weight_mean, weight_std = objective.spread(scores.mix_weight, every)
    return {
        "base_nll": base_loss.detach(),
        "mixed_nll": mixed_loss,
        **{f"mixed_nll_{j + 1}": step for j, step in enumerate(steps)},
        "reward_mean": reward_mean,
        "reward_std": reward_std,
        "mix_weight_mean": weight_mean,
        "mix_weight_std": weight_std,
        "mix_weight_positive": objective.masked_mean((scores.mix_weight > 0).float(), every),
        "talk_gain": objective.masked_mean(base_nll - scores.talk, looked),
        "policy_loss": scores.policy.detach(),
        "positive_advantages": objective.masked_mean((scores.advantage > 0).float(), rewarded),
        "thoughts": layout.valid.sum() * layout.num_thoughts,
    }
