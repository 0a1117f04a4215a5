"""Predict the next token at chosen positions of a batch, in every way that an evaluation compares.

The geometry is that of training: the same layout, rollout and pass over the slots, one thought a position,
and the prediction right after it. Legend: B rows, T tokens, M positions, k thought tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from qstar_kernels.vocabulary import LinearHead, logits, mixed_logits, mixed_nll, nll
from torch import Tensor

from qstar.boundary import SUBSTITUTES, boundary_token_id
from qstar.config import QuietStarConfig
from qstar.data import collate
from qstar.layout import TextRows, ThoughtLayout
from qstar.model import QuietStarForCausalLM

# without: the base model's own prediction (w = 0); shuffled: after the thought of another position; pause:
# after k times the same token, which takes the same slots but says nothing
WAYS = ("without", "thoughts", "shuffled", "pause")
ALONE = "alone"  # after a thought, with w = 1


@dataclass(frozen=True)
class ThoughtSampling:
    """How thoughts are made. temperature: 0 is argmax; pause_token: the token that a pause repeats, from
    `pause_token`. Raises ValueError for a negative temperature."""

    temperature: float = 0.0
    pause_token: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"thought_temperature = {self.temperature}: must be at least 0")


@dataclass(frozen=True)
class Predictions:
    """Hidden states to predict from: base [M, D] of the text, thought [M, D] after a thought and its weight
    [M] fp32, both None if w = 0. tokens [M, k] int64: the thoughts."""

    base: Tensor
    thought: Tensor | None = None
    weight: Tensor | None = None
    tokens: Tensor | None = None

    @torch.no_grad()
    def logits(self, head: LinearHead, at: slice | Tensor = slice(None)) -> Tensor:
        """Return the logits [m, V] fp32 at the positions `at`."""
        if self.thought is None or self.weight is None:
            return logits(self.base[at], head)
        return mixed_logits(self.base[at], self.thought[at], self.weight[at], head)

    @torch.no_grad()
    def nll(self, head: LinearHead, targets: Tensor) -> Tensor:
        """Return the NLL [M] of targets [M] int64 in nats; no logits are kept."""
        if self.thought is None or self.weight is None:
            return nll(self.base, head, targets)
        return mixed_nll(self.base, self.thought, self.weight, head, targets)


def evaluated(config: QuietStarConfig, temperature: float = 0.0) -> QuietStarConfig:
    """Return the config of an evaluation: one thought at every position in question, one token after it."""
    return replace(
        config,
        num_thoughts=1,
        talk_length=1,
        thought_temperature=temperature,
        thinking_positions="all",
        thinking_fraction=1.0,
    )


def padded(
    asked: Sequence[tuple[Sequence[int], Sequence[int]]], device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the batch and the at [B, T] bool that `predict` takes, from rows (token ids, positions in
    question), padded on the right to at least two tokens, the shortest text."""
    rows = [{"input_ids": list(ids), "position_ids": list(range(len(ids)))} for ids, _ in asked]
    length = max(2, *(len(ids) for ids, _ in asked))
    batch = {name: x.to(device) for name, x in collate(rows, length).items()}
    at = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for row, (_, positions) in enumerate(asked):
        at[row, list(positions)] = True
    return batch, at


@torch.no_grad()
def predict(
    model: QuietStarForCausalLM,
    batch: dict[str, Tensor],
    at: Tensor,
    ways: tuple[str, ...] = WAYS,
    thinking: ThoughtSampling | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Predictions]:
    """Predict the token after each position where at [B, T] is True, in row order; by way.

    batch: input_ids, attention_mask and, for packed rows, position_ids [B, T]. The thoughts are the same for
    every way; generator draws them, and where each goes in "shuffled". Raises ValueError for a pause without
    its token, and for fewer than two thoughts to shuffle.
    """
    thinking = thinking or ThoughtSampling()
    rows = TextRows.from_batch(batch["input_ids"], batch["attention_mask"], batch.get("position_ids"))
    thinker = replace(model.thinker, config=evaluated(model.quiet_star, thinking.temperature))
    hidden, keys_values = thinker.read_text(batch["input_ids"], rows)
    base = hidden[at]
    found = {"without": Predictions(base)} if "without" in ways else {}
    if set(ways) <= {"without"}:
        return found
    layout = ThoughtLayout.plan(rows, at, thinker.config)
    parts = list(layout.chunks(thinker.config.chunk_positions or layout.positions.shape[1]))
    written_on = thinker.authors_text(batch["input_ids"], rows, keys_values)
    own = torch.cat([thinker.sample_thoughts(written_on, part, generator) for _, part in parts], 1)
    for way in dict.fromkeys("thoughts" if way == ALONE else way for way in ways if way != "without"):
        tokens = own
        if way == "shuffled":
            tokens = shuffled(own, layout.valid, generator)
        elif way == "pause":
            if thinking.pause_token is None:
                raise ValueError("pause_token = None: a pause needs a token to repeat")
            tokens = torch.full_like(own, thinking.pause_token)
        read = (
            thinker.read_thoughts(batch["input_ids"], hidden, keys_values, part, tokens[:, where])
            for where, part in parts
        )
        talk, weight = zip(*((x.talk_hidden[:, :, 0, 0], x.mix_weight[:, :, 0, 0]) for x in read))
        valid = layout.valid
        found[way] = Predictions(
            base, torch.cat(talk, 1)[valid], torch.cat(weight, 1)[valid], tokens[:, :, 0][valid]
        )
    if ALONE in ways:
        mixed = found["thoughts"]
        found[ALONE] = replace(mixed, weight=torch.ones_like(mixed.weight))  # type: ignore[arg-type]
    return found


def shuffled(thoughts: Tensor, valid: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Move every thought of [B, P, 1, k] to the position of another, and to another row if no row has more
    than half of the valid [B, P] positions. Raises ValueError for fewer than two positions."""
    count = int(valid.sum())
    if count < 2:
        raise ValueError(f"batch_size: {count} thoughts in a batch cannot be shuffled; try larger batches")
    row = valid.nonzero()[:, 0].cpu()
    by_row, within = (torch.rand(n, generator=generator) for n in (len(valid), count))
    # put rows in random order, and positions in random order within each; then shift all by the longest row
    order = within.argsort()
    order = order[by_row[row[order]].argsort(stable=True)]
    distance = min(int(valid.sum(1).max()), count - 1)
    source = torch.empty_like(order)
    source[order] = order.roll(distance)
    moved = thoughts.clone()
    moved[valid] = thoughts[valid][source.to(thoughts.device)]
    return moved


def pause_token(tokenizer) -> int:
    """Return the token that a pause repeats: a dash, or another text that the boundaries may begin from.
    Raises ValueError if none of these texts is one token."""
    token, _ = boundary_token_id(tokenizer, "pause", SUBSTITUTES[0])
    if token is None:
        raise ValueError(f"pause: none of {SUBSTITUTES} is one token of this tokenizer")
    return token
