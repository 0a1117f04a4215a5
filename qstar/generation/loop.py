"""Generate: draft with the base model alone, think at all drafted positions at once, keep what the mixed
prediction agrees to.

A round drafts g tokens; their hidden states and K/V are needed for mixing anyway, so a kept draft costs
nothing more. Each of the g + 1 positions then thinks as a block of slots over the shared prefix, all in one
batch, and the drafts are kept by speculative sampling: the text has exactly the distribution of thinking one
token at a time, which is g = 0. Where a position does not think, the base prediction is the mixed one, and
its draft is always kept. Rows grow unevenly. Legend: B rows, n = g + 1 positions of a round, P of which think
in a row, k thought tokens, D width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from qstar_kernels.vocabulary import logits
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from qstar.attention_interface import BlockPass
from qstar.base_model import read_slots
from qstar.generation.acceptance import DraftLength, accept_greedy, accept_sampled
from qstar.kv_cache import SlotCache, TextCache
from qstar.layout import TextRows
from qstar.supported import context_length
from qstar.thinker import Thinker

THINK = ("always", "adaptive", "never")
LONGEST_DRAFT = 32  # where few positions think


@dataclass(frozen=True)
class ThoughtSchedule:
    """Say where and how far ahead to think. think: one of THINK; entropy_threshold: for adaptive, in nats of
    the base prediction; draft_length: None adapts to the acceptance, 0 thinks one token at a time."""

    think: str
    entropy_threshold: float | None = None
    draft_length: int | None = None


@dataclass
class Written:
    """Record what one row has written, token by token; where it did not think, its thought is empty and its
    weight 0."""

    tokens: list[int] = field(default_factory=list)
    thoughts: list[list[int]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    base_logprobs: list[float] = field(default_factory=list)
    mixed_logprobs: list[float] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    finished: bool = False


@dataclass
class Counts:
    """Count calls of the base model after the prompt, drafts tested and accepted, thoughts, and rounds."""

    model_steps: int = 0
    tested: int = 0
    accepted: int = 0
    thoughts: int = 0
    rounds: int = 0


@dataclass(frozen=True)
class _Draft:
    """hidden [B, n, D]; base [B, n, V] fp32 logits; from_scores: n - 1 of [B, V], the processed logits that
    tokens [B, n - 1] were drawn from; thinks [B, n] bool; ended: every row's draft holds an end."""

    hidden: Tensor
    base: Tensor
    from_scores: list[Tensor]
    tokens: Tensor
    thinks: Tensor
    ended: bool


# (row, token, thought or None), as soon as a token is certain
OnToken = Callable[[int, int, list[int] | None], None]
OnFinished = Callable[[int], None]  # (row), after its last token


class Generation:
    """Continue one batch of prompts; `run` returns what each row wrote."""

    def __init__(
        self,
        thinker: Thinker,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        schedule: ThoughtSchedule,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        max_length: int,
        sample: bool,
        generator: torch.Generator | None = None,
        keep: tuple[str, ...] = (),
        on_token: OnToken | None = None,
        on_finished: OnFinished | None = None,
        eos: list[int] | None = None,
    ):
        """keep: which of "logits" (the mixed ones) and "scores" (processed) to keep for every token; eos: ids
        after which nothing is drafted (the criteria decide where a row ends)."""
        self.thinker, self.schedule, self.sample, self.generator = thinker, schedule, sample, generator
        self.head = thinker.linear_head()
        self.processors, self.criteria, self.max_length = processors, criteria, max_length
        self.keep, self.on_token, self.on_finished = keep, on_token, on_finished
        B, T = input_ids.shape
        room = max_length + LONGEST_DRAFT + 1
        self.ids = input_ids.new_zeros(B, room)
        self.ids[:, :T] = input_ids
        self.columns = [T] * B  # certain tokens of each row, left padding counted
        rows = _rows(input_ids, attention_mask)
        self.eos = torch.tensor(eos or [], dtype=torch.long, device=input_ids.device)
        self.start = rows.segment_start[:, -1:]
        k = thinker.config.thought_length
        context = context_length(thinker.base.config)
        self.last_position = room + k + 1 if context is None else context - 1
        hidden, keys_values = thinker.read_text(input_ids, rows)
        self.hidden: Tensor | None = hidden[:, -1]  # of the last certain token; None: it has not been read
        self.text = TextCache(keys_values, room)
        self.authors_text = self.text  # thoughts are written on it; a frozen writer reads for itself
        if thinker.writer is not None:
            self.authors_text = TextCache(thinker.authors_text(input_ids, rows, keys_values), room)
        self.written = [Written() for _ in range(B)]
        self.counts = Counts()
        self.length = DraftLength(k + 1, schedule.draft_length)

    def run(self) -> list[Written]:
        while not all(row.finished for row in self.written):
            self._round()
        return self.written

    def _round(self) -> None:
        self.counts.rounds += 1
        at = torch.tensor(self.columns, device=self.ids.device)
        draft = self._draft(at)
        mixed, thoughts, weights = self._think(draft, at)
        scores = [self._processed(mixed[:, i], i) for i in range(mixed.shape[1] - draft.ended)]
        if draft.ended:  # a token after the end is never kept: no processor is asked about it
            scores.append(mixed[:, -1])
        if self.sample:
            wanted, drafted_from = (
                torch.stack([x.softmax(-1) for x in given], 1) if given else mixed[:, :0]
                for given in (scores, draft.from_scores)
            )
            count, last = accept_sampled(wanted, drafted_from, draft.tokens, self.generator)
        else:
            count, last = accept_greedy(torch.stack(scores, 1), draft.tokens)
        self._commit(draft, mixed, scores, thoughts, weights, count.tolist(), last)

    def _draft(self, at: Tensor) -> _Draft:
        """Read the last certain token where that is due, then draft; at [B]: certain tokens of each row."""
        if self.hidden is None:
            last = self.ids.gather(1, at[:, None] - 1)
            self.hidden = self._read_token(last, at - 1, max(self.columns) - 1)
        left = max(self.max_length - n for n, row in zip(self.columns, self.written) if not row.finished)
        wanted = self.length.next()
        most = 0 if self.schedule.think == "never" else min(left - 1, LONGEST_DRAFT)
        if self.schedule.think == "always":
            most = min(most, wanted)
        active = torch.tensor([not row.finished for row in self.written], device=at.device)
        hidden: list[Tensor] = []
        base: list[Tensor] = []
        from_scores: list[Tensor] = []
        tokens: list[Tensor] = []
        thinks: list[Tensor] = []
        ended = ~active
        while True:
            i = len(hidden)
            hidden.append(self.hidden)
            base.append(logits(self.hidden, self.head))
            thinks.append(self._wants_thought(base[-1]) & ~ended)
            enough = int(torch.stack(thinks).sum(0).max()) > wanted
            if i >= most or enough or bool(ended.all()):
                break
            from_scores.append(self._processed(base[-1], i))
            token = self._choose(from_scores[-1])
            tokens.append(token)
            ended = ended | torch.isin(token, self.eos)
            self.ids[torch.arange(len(at), device=at.device), at + i] = token
            self.hidden = self._read_token(token[:, None], at + i, max(self.columns) + i)
        self.hidden = None
        return _Draft(
            hidden=torch.stack(hidden, 1),
            base=torch.stack(base, 1),
            from_scores=from_scores,
            tokens=torch.stack(tokens, 1) if tokens else self.ids[:, :0],
            thinks=torch.stack(thinks, 1),
            ended=bool(tokens) and bool(ended.all()),
        )

    def _wants_thought(self, base: Tensor) -> Tensor:
        if self.schedule.think == "adaptive":
            p = base.softmax(-1)
            return torch.special.entr(p).sum(-1) > self.schedule.entropy_threshold
        return torch.full(base.shape[:1], self.schedule.think == "always", device=base.device)

    def _choose(self, scores: Tensor) -> Tensor:
        if not self.sample:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), 1, generator=self.generator).squeeze(-1)

    def _processed(self, scores: Tensor, i: int) -> Tensor:
        """Apply the logits processors to scores [B, V] of the i-th position of this round, each row with its
        own text before it. They may know the whole batch: rows of different lengths take several calls."""
        if not self.processors:
            return scores
        found = torch.empty_like(scores)
        for n in sorted(set(self.columns)):
            has = torch.tensor([columns == n for columns in self.columns], device=scores.device)
            ids = self.ids[:, : n + i]
            if not bool(has.all()):  # the other rows have no text up to here: they show one that has
                ids = torch.where(has[:, None], ids, ids[has][:1])
            # a copy: they may write to what they are given
            found[has] = self.processors(ids, scores.clone())[has]
        return found

    def _read_token(self, token: Tensor, column: Tensor, longest: int) -> Tensor:
        """Read token [B, 1] as a block of one slot, which becomes column [B] of the text; return its hidden
        state [B, D]."""
        hidden = self._extend(self.thinker.base, self.text, token, column, longest)
        if self.thinker.writer is not None:
            self._extend(self.thinker.writer.base, self.authors_text, token, column, longest)
        return hidden[:, -1]

    def _extend(
        self, base: PreTrainedModel, text: TextCache, token: Tensor, column: Tensor, longest: int
    ) -> Tensor:
        slots = SlotCache(1)
        embedding = base.get_input_embeddings()(token)
        hidden = self._read(base, text, embedding, column[:, None], 0, slots, longest)
        text.write(slots, column)
        return hidden

    def _read(
        self,
        base: PreTrainedModel,
        text: TextCache,
        embeddings: Tensor,
        end: Tensor,
        first: int,
        slots: SlotCache,
        longest: int,
    ) -> Tensor:
        """Read slots [first, ..) of blocks after `end` [B, P] columns: embeddings [B, P * Lq, D] -> hidden
        states [B, P * Lq, D]."""
        self.counts.model_steps += 1
        B, P = end.shape
        each = embeddings.shape[1] // P
        positions = (end - self.start)[..., None] + torch.arange(first, first + each, device=end.device)
        positions = positions.clamp(max=self.last_position)  # those beyond it are thrown away
        start = self.start.expand(B, P)
        block_pass = BlockPass(
            text.read(longest), start.int(), end.int(), slots, first, self.thinker.config.attention
        )
        return read_slots(base, embeddings, positions.flatten(1), block_pass)

    def _think(self, draft: _Draft, at: Tensor) -> tuple[Tensor, dict[tuple[int, int], list[int]], Tensor]:
        """Think where the draft says: (mixed logits [B, n, V], thoughts by (row, position), mixing weights
        [B, n])."""
        B, n = draft.thinks.shape
        weights = torch.zeros(B, n, device=at.device)
        P = int(draft.thinks.sum(1).max())
        if P == 0:
            return draft.base, {}, weights
        # the positions that think, first in order; a row with fewer thinks at others too, for nothing
        position = draft.thinks.long().argsort(dim=1, descending=True, stable=True)[:, :P]
        valid = draft.thinks.gather(1, position)
        end = at[:, None] + position
        longest = max(self.columns) + n - 1
        thinker, k = self.thinker, self.thinker.config.thought_length
        slots = SlotCache(k + 2)

        def read(embeddings: Tensor, first: int, cache: SlotCache) -> Tensor:
            return self._read(thinker.author[0], self.authors_text, embeddings, end, first, cache, longest)

        thought = thinker.rollout(read, (B, P), slots, self.generator)
        unread = thinker.slots(thought, talk=thought[..., :0])
        if thinker.writer is None:  # the rollout has read all but the last two
            unread = unread[:, :, k:]
        else:
            slots = SlotCache(k + 2)
        talk = self._read(
            thinker.base, self.text, unread.flatten(1, 2), end, k + 2 - unread.shape[2], slots, longest
        )
        talk = talk.unflatten(1, (P, -1))[:, :, -1]
        base_hidden = draft.hidden.gather(1, position[..., None].expand(-1, -1, draft.hidden.shape[-1]))
        w = thinker.mixing(base_hidden, talk).float()
        mixed = draft.base.clone()
        row, which = valid.nonzero(as_tuple=True)
        there = position[row, which]
        share = w[row, which][:, None]
        spoken = logits(talk[row, which], self.head)
        mixed[row, there] = (1 - share) * draft.base[row, there] + share * spoken
        weights[row, there] = w[row, which]
        thoughts = {(b, i): c for b, i, c in zip(row.tolist(), there.tolist(), thought[row, which].tolist())}
        self.counts.thoughts += len(thoughts)
        return mixed, thoughts, weights

    def _commit(self, draft, mixed, scores, thoughts, weights, count: list[int], last: Tensor) -> None:
        """Append to each row its kept drafts and the token after them, up to where it stops."""
        n = mixed.shape[1]
        new = torch.cat([draft.tokens, draft.tokens.new_zeros(len(count), 1)], 1)
        kept = torch.tensor(count, device=new.device)[:, None]
        new.scatter_(1, kept, last[:, None])
        self.ids.scatter_(1, torch.tensor(self.columns, device=new.device)[:, None] + kept, last[:, None])
        base_logprobs, mixed_logprobs = (
            (x.gather(2, new[..., None]).squeeze(2) - x.logsumexp(-1)).tolist() for x in (draft.base, mixed)
        )
        weight = weights.tolist()
        for b, (row, tokens) in enumerate(zip(self.written, new.tolist())):
            if row.finished:
                continue
            judged = [i for i in range(n - 1) if i <= count[b] and (b, i) in thoughts]
            tested, accepted = len(judged), sum(i < count[b] for i in judged)
            self.counts.tested += tested
            self.counts.accepted += accepted
            self.length.saw(accepted, tested)
            for i in range(count[b] + 1):
                row.tokens.append(tokens[i])
                row.thoughts.append(thoughts.get((b, i), []))
                row.weights.append(weight[b][i])
                row.base_logprobs.append(base_logprobs[b][i])
                row.mixed_logprobs.append(mixed_logprobs[b][i])
                if "logits" in self.keep:
                    row.logits.append(mixed[b, i].clone())
                if "scores" in self.keep:
                    row.scores.append(scores[i][b].clone())
                self.columns[b] += 1
                if self.on_token is not None:
                    self.on_token(b, tokens[i], thoughts.get((b, i)))
                so_far = self.ids[b : b + 1, : self.columns[b]]
                if bool(self.criteria(so_far, scores[i][b : b + 1]).all()):
                    row.finished = True
                    if self.on_finished is not None:
                        self.on_finished(b)
                    break


def _rows(input_ids: Tensor, attention_mask: Tensor | None) -> TextRows:
    if input_ids.shape[1] > 1:
        return TextRows.from_batch(input_ids, attention_mask)
    zero = torch.zeros_like(input_ids)
    return TextRows(zero, zero, zero + 1, torch.ones_like(input_ids, dtype=torch.bool))
