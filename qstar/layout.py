"""Lay out one batch: which tokens form a text, which positions think, and where every slot lies.

This is the only place that does index arithmetic. Legend: B rows, T tokens in a row, P thinking positions in
a row, R thoughts per position, N = P * R blocks (the thoughts of a position side by side), k thought tokens,
m talk tokens, L = k + m + 1 slots in a block: `<start>`, c_1 .. c_k, `<end>`, x_{t+1} .. x_{t+m-1}.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qstar.config import QuietStarConfig
from qstar.distributed_random import rand

IGNORE = -100  # the label that Hugging Face and torch leave out of a loss


@dataclass(frozen=True)
class TextRows:
    """Cut rows of tokens into texts: padding and every packed document are segments of their own.

    position_ids [B, T] int64, counted from the start of each segment; a model given them and no mask keeps
    the segments apart. segment_start, segment_end [B, T] int64: the segment [start, end) that each token lies
    in; is_text [B, T] bool: False on padding.
    """

    position_ids: Tensor
    segment_start: Tensor
    segment_end: Tensor
    is_text: Tensor

    @classmethod
    def from_batch(
        cls, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> TextRows:
        """Find the texts of input_ids [B, T].

        attention_mask [B, T] of 0 and 1; position_ids [B, T] only for rows that pack several documents, each
        counted from 0 (the convention of Hugging Face's DataCollatorWithFlattening). Raises ValueError for
        other shapes, fewer than 2 tokens, and position_ids that count otherwise.
        """
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: must be [batch, tokens]")
        B, T = input_ids.shape
        if B < 1 or T < 2:
            raise ValueError(f"input_ids has shape {(B, T)}: a text needs at least 2 tokens")
        device = input_ids.device
        for name, given in (("attention_mask", attention_mask), ("position_ids", position_ids)):
            if given is not None and given.shape != input_ids.shape:
                raise ValueError(
                    f"{name} has shape {tuple(given.shape)}: must be that of input_ids, {(B, T)}"
                )
        index = torch.arange(T, device=device).expand(B, T)
        is_text = (
            torch.ones(B, T, dtype=torch.bool, device=device)
            if attention_mask is None
            else attention_mask != 0
        )
        begins = index == 0
        begins[:, 1:] |= is_text[:, 1:] != is_text[:, :-1]
        if position_ids is not None:
            begins[:, 1:] |= position_ids[:, 1:] != position_ids[:, :-1] + 1
        start = torch.where(begins, index, 0).cummax(dim=1).values
        ends = torch.ones_like(begins)
        ends[:, :-1] = begins[:, 1:]
        end = torch.where(ends, index + 1, T).flip(1).cummin(dim=1).values.flip(1)
        counted = index - start
        if position_ids is not None and bool(((position_ids != counted) & is_text).any()):
            raise ValueError("position_ids: each document must count its tokens from 0, in steps of 1")
        return cls(counted, start, end, is_text)

    def labels(self, input_ids: Tensor, labels: Tensor | None) -> Tensor:
        """Return the labels [B, T]: those given, or every token of a text. Raises ValueError for another
        shape."""
        if labels is None:
            return input_ids.masked_fill(~self.is_text, IGNORE)
        if labels.shape != input_ids.shape:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}: must be that of input_ids, {tuple(input_ids.shape)}"
            )
        return labels

    def predicts(self, labels: Tensor) -> Tensor:
        """Mark, [B, T] bool, where position t predicts a token x_{t+1} of its own text whose label [B, T] is
        not ignored."""
        T = labels.shape[1]
        has_next = torch.arange(1, T + 1, device=labels.device) < self.segment_end
        next_label = torch.full_like(labels, IGNORE)
        next_label[:, :-1] = labels[:, 1:]
        return self.is_text & has_next & (next_label != IGNORE)

    def scored(self, predicts: Tensor, talk_length: int) -> Tensor:
        """Mark, [B, T, m] bool, where x_{t+1+j} is a target of t's own text; predicts [B, T] from
        `predicts`."""
        B, T = predicts.shape
        reach = torch.arange(T, device=predicts.device)[:, None]
        reach = reach + torch.arange(talk_length, device=predicts.device)  # t + j
        inside = reach < self.segment_end[..., None]
        reach = reach.clamp(max=T - 1).expand(B, T, talk_length)
        return predicts.gather(1, reach.reshape(B, -1)).view(B, T, talk_length) & inside

    def rewarded(self, scored: Tensor) -> Tensor:
        """Mark, [B, T] bool, where thoughts enter the policy loss (t <= T - 2 - m of the text, with a
        target); scored [B, T, m] from `scored`."""
        T, m = scored.shape[1:]
        last = torch.arange(T, device=scored.device) + m + 2
        return (last <= self.segment_end) & scored.any(-1)

    def items(self, labels: Tensor, talk_length: int, think_mask: Tensor | None = None) -> Tensor:
        """Count what the loss is a mean over, [m + 2] int64: targets, targets of each talk step, rewarded
        positions; if all positions think, or those of think_mask [B, T]."""
        predicts = self.predicts(labels)
        scored = self.scored(predicts, talk_length)
        if think_mask is not None:
            scored = scored & (think_mask != 0)[..., None]
        return torch.cat([predicts.sum()[None], scored.sum((0, 1)), self.rewarded(scored).sum()[None]])


@dataclass(frozen=True)
class ThoughtLayout:
    """Say where the blocks of a batch hang and what each of their slots is.

    positions [B, P] int64: the token that each block continues (0 where padded); valid [B, P] bool: not
    padded; prefix_start, prefix_end [B, N] int32: the prefix keys of each block (empty where padded);
    slot_position_ids [B, N, L] int64; talk_index [B, P, m] int64: t + j, the token whose base prediction is
    mixed, and after j = 0 the talk token that is fed; target_valid [B, P, m] bool: x_{t+1+j} is a target;
    rewarded [B, P] bool: enters the policy loss (t <= T - 2 - m of its text, with a target); rows: the texts.
    """

    positions: Tensor
    valid: Tensor
    prefix_start: Tensor
    prefix_end: Tensor
    slot_position_ids: Tensor
    talk_index: Tensor
    target_valid: Tensor
    rewarded: Tensor
    rows: TextRows
    num_thoughts: int

    @property
    def target_index(self) -> Tensor:
        """[B, P, m] int64: t + 1 + j, kept inside the row."""
        return (self.talk_index + 1).clamp(max=self.rows.is_text.shape[1] - 1)

    def chunks(self, size: int) -> Iterator[tuple[slice, ThoughtLayout]]:
        """Iterate over `size` positions of each row at a time: (which positions, their layout)."""
        P, R = self.positions.shape[1], self.num_thoughts
        for first in range(0, P, size):
            at = slice(first, min(first + size, P))
            blocks = slice(at.start * R, at.stop * R)
            part = replace(
                self,
                positions=self.positions[:, at],
                valid=self.valid[:, at],
                prefix_start=self.prefix_start[:, blocks],
                prefix_end=self.prefix_end[:, blocks],
                slot_position_ids=self.slot_position_ids[:, blocks],
                talk_index=self.talk_index[:, at],
                target_valid=self.target_valid[:, at],
                rewarded=self.rewarded[:, at],
            )
            yield at, part

    @classmethod
    def plan(
        cls,
        rows: TextRows,
        predicts: Tensor,
        config: QuietStarConfig,
        entropy: Tensor | None = None,
        generator: torch.Generator | None = None,
        think_mask: Tensor | None = None,
    ) -> ThoughtLayout:
        """Choose the thinking positions among those that predict anything, and lay out their blocks.

        predicts [B, T] bool from `TextRows.predicts`; entropy [B, T] of the base prediction in nats, for
        'uncertain'; think_mask [B, T]: think wherever it is not 0 and a target follows, and nowhere else.
        Raises ValueError for a think_mask of another shape or without any position to think at.
        """
        B, T = predicts.shape
        device = predicts.device
        scored = rows.scored(predicts, config.talk_length)
        candidate = scored.any(-1)
        if think_mask is not None:
            if think_mask.shape != predicts.shape:
                raise ValueError(
                    f"think_mask has shape {tuple(think_mask.shape)}: must be that of input_ids, {(B, T)}"
                )
            candidate = candidate & (think_mask != 0)
            if not bool(candidate.any()):
                raise ValueError("think_mask: no position that it chooses has a target after it")

        # 0.3 * 50 must count as 15, though 0.3 has no exact binary form
        wanted = (candidate.sum(1).double() * config.thinking_fraction - 1e-9).ceil().long()
        counts = candidate.sum(1)
        if think_mask is None:
            counts = wanted.clamp(min=1).minimum(counts)
        if think_mask is not None or config.thinking_positions == "all":
            score = torch.zeros(B, T, device=device)
        elif config.thinking_positions == "random":
            score = rand(1, B, T, generator, device)[0]
        else:
            if entropy is None:
                raise ValueError(
                    "entropy = None: thinking_positions = 'uncertain' needs the base entropy [B, T]"
                )
            score = entropy.float()
        order = score.masked_fill(~candidate, -math.inf).argsort(dim=1, descending=True, stable=True)
        P = int(counts.max())
        valid = torch.arange(P, device=device) < counts[:, None]
        # ascending within a row: neighbours share most of their prefix, which the kernels use
        positions, rank = torch.where(valid, order[:, :P], T).sort(dim=1)
        valid = valid.gather(1, rank)
        return cls.at(rows, positions.masked_fill(~valid, 0), valid, scored, config)

    @classmethod
    def at(
        cls, rows: TextRows, positions: Tensor, valid: Tensor, scored: Tensor, config: QuietStarConfig
    ) -> ThoughtLayout:
        """Lay out blocks at the given positions [B, P] int64; valid [B, P] bool; scored [B, T, m] bool:
        x_{t+1+j} is a target."""
        B, P = positions.shape
        T = rows.is_text.shape[1]
        m, R, device = config.talk_length, config.num_thoughts, positions.device

        def pick(values: Tensor) -> Tensor:  # [B, T] -> [B, P]
            return values.gather(1, positions)

        def by_thought(values: Tensor) -> Tensor:  # [B, P] -> [B, P * R]
            return values.repeat_interleave(R, dim=1)

        start = pick(rows.segment_start)
        end = torch.where(valid, positions + 1, start)
        first = pick(rows.position_ids) + 1
        slot_positions = by_thought(first)[..., None] + torch.arange(config.slots, device=device)
        talk_index = (positions[..., None] + torch.arange(m, device=device)).clamp(max=T - 1)
        target_valid = scored.gather(1, positions[..., None].expand(B, P, m)) & valid[..., None]
        return cls(
            positions=positions,
            valid=valid,
            prefix_start=by_thought(start).int(),
            prefix_end=by_thought(end).int(),
            slot_position_ids=slot_positions,
            talk_index=talk_index,
            target_valid=target_valid,
            rewarded=pick(rows.rewarded(scored)) & valid,
            rows=rows,
            num_thoughts=R,
        )
