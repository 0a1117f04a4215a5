"""What a model thinks after every token of one text, and what it predicts before and after thinking.

Legend: T tokens, R thoughts per position, k thought tokens, m talk tokens, K predictions shown, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from qstar_kernels.vocabulary import LinearHead, chunk_rows, logits, mixed_logits, mixed_nll, nll
from torch import Tensor
from tqdm.auto import tqdm

from qstar import objective
from qstar.base_model import in_eval_mode
from qstar.config import QuietStarConfig
from qstar.evaluation.predictions import evaluated, shuffled
from qstar.layout import TextRows, ThoughtLayout
from qstar.model import QuietStarForCausalLM
from qstar.thinker import Thoughts

SHOWN = 4  # likeliest tokens of a prediction
POSITIONS = 128  # that are read at once: bounds the memory of a long text
NOTICED = 0.01  # nats: a smaller gain or loss is none to speak of


@dataclass(frozen=True)
class Look:
    """Position t is that after x_t; it predicts x_{t+1}, which the last one lacks. On the CPU, NLLs in nats.

    token [T] and thought [T, R, k] int64; base_nll [T - 1]; mixed_nll, alone_nll (w = 1) and shuffled_nll (a
    thought of another position) [T - 1, R]; mix_weight [T, R] of the next token; reward [T - 1, R], of the
    next m tokens as far as the text goes; before [T, K] and after [T, R, K]: (probabilities, ids) of the
    likeliest tokens without and with a thought. silent: w is 0 everywhere; then `after` is at w = 1.
    """

    config: QuietStarConfig
    token: Tensor
    thought: Tensor
    base_nll: Tensor
    mixed_nll: Tensor
    alone_nll: Tensor
    shuffled_nll: Tensor
    mix_weight: Tensor
    reward: Tensor
    before: tuple[Tensor, Tensor]
    after: tuple[Tensor, Tensor]
    silent: bool

    @property
    def gain(self) -> Tensor:
        """[T - 1]: base NLL minus mixed NLL, the mean over the thoughts of a position."""
        return self.base_nll - self.mixed_nll.mean(1)

    def summary(self) -> dict[str, float]:
        """Means over the predicted tokens, in nats per token, and the shares of them that gain or lose
        more than NOTICED."""
        return {
            "tokens": len(self.token),
            "base_nll": float(self.base_nll.mean()),
            "mixed_nll": float(self.mixed_nll.mean()),
            "shuffled_nll": float(self.shuffled_nll.mean()),
            "alone_nll": float(self.alone_nll.mean()),
            "gain": float(self.gain.mean()),
            "gaining_share": float((self.gain > NOTICED).float().mean()),
            "losing_share": float((self.gain < -NOTICED).float().mean()),
            "mix_weight": float(self.mix_weight[:-1].mean()),
        }


def look_config(
    config: QuietStarConfig,
    thought_length: int | None = None,
    num_thoughts: int | None = None,
    thought_temperature: float | None = None,
) -> QuietStarConfig:
    """The model's knobs, with others where they are given, thinking everywhere. Raises ValueError for several
    thoughts at temperature 0, which would all be the same; by default there is one then."""
    temperature = config.thought_temperature if thought_temperature is None else thought_temperature
    if temperature == 0 and (num_thoughts or 1) > 1:
        raise ValueError(f"num_thoughts = {num_thoughts}: must be 1 where thought_temperature is 0")
    if num_thoughts is None:
        num_thoughts = 1 if temperature == 0 else config.num_thoughts
    return replace(
        evaluated(config, temperature),
        thought_length=config.thought_length if thought_length is None else thought_length,
        talk_length=config.talk_length,
        num_thoughts=num_thoughts,
        block_chunk=None,
    )


@torch.no_grad()
def look(
    model: QuietStarForCausalLM,
    ids: list[int],
    config: QuietStarConfig | None = None,
    generator: torch.Generator | None = None,
) -> Look:
    """Let the model think R times after each of ids [T], the last one too. config: from `look_config`;
    generator draws the thoughts, and which of them go where for shuffled_nll. Raises ValueError for fewer
    than two ids, and more than fit the model's context with a thought after the last one."""
    config = config or look_config(model.quiet_star)
    if len(ids) < 2:
        raise ValueError(f"text has {len(ids)} tokens: must have at least 2")
    model.check_length(len(ids) + 1, "text, with the token to come,", config)
    with in_eval_mode(model):
        return _look(model, torch.tensor([ids], device=model.boundary.start_raw.device), config, generator)


def _look(
    model: QuietStarForCausalLM,
    input_ids: Tensor,
    config: QuietStarConfig,
    generator: torch.Generator | None,
) -> Look:
    (_, T), head = input_ids.shape, model.linear_head()
    rows = TextRows.from_batch(input_ids)
    predicts = rows.predicts(input_ids)
    positions, valid = torch.arange(T, device=input_ids.device)[None], torch.ones_like(predicts)
    layout = ThoughtLayout.at(rows, positions, valid, rows.scored(predicts, config.talk_length), config)
    size = max(1, min(POSITIONS, chunk_rows(len(head.weight)) // config.num_thoughts))
    parts = list(layout.chunks(size))
    thinker = replace(model.thinker, config=config)
    hidden, text = thinker.read_text(input_ids, rows)
    written_on = thinker.authors_text(input_ids, rows, text)

    with tqdm(total=3 * len(parts), desc="look", leave=False) as bar:

        def each() -> Iterator[tuple[slice, ThoughtLayout]]:
            for part in parts:
                yield part
                bar.update()

        def read(thoughts: Tensor) -> tuple[Tensor, ...]:
            """Of thoughts [1, T, R, k]: h_talk [T, R, D] and w [T, R] of the next token, NLLs [T, R, m]."""
            found = []
            for at, part in each():
                x = thinker.read_thoughts(input_ids, hidden, text, part, thoughts[:, at])
                mixed = _mixed_nll(x, head, input_ids)
                found.append((x.talk_hidden[0, :, :, 0], x.mix_weight[0, :, :, 0], mixed))
            return tuple(torch.cat(x) for x in zip(*found))

        own = torch.cat([thinker.sample_thoughts(written_on, x, generator) for _, x in each()], 1)
        talk, weight, mixed = read(own)
        *_, others = read(shuffled(own, valid, generator))

    base, targets = hidden[0], input_ids[0, 1:]
    base_nll = nll(base[:-1], head, targets)
    at_talk = torch.cat([base_nll, base_nll.new_zeros(1)])[layout.talk_index[0]]
    alone = [nll(x, head, targets) for x in talk[:-1].unbind(1)]
    silent = not bool(weight.any())
    shown = torch.ones_like(weight) if silent else weight
    figures = {
        "token": input_ids[0],
        "thought": own[0],
        "base_nll": base_nll,
        "mixed_nll": mixed[:-1, :, 0],
        "alone_nll": torch.stack(alone, 1),
        "shuffled_nll": others[:-1, :, 0],
        "mix_weight": weight,
        "reward": objective.reward(at_talk[:, None], mixed, layout.target_valid[0, :, None])[:-1],
    }
    return Look(
        config=config,
        silent=silent,
        before=_joined(logits(base[at], head) for at, _ in parts),
        after=_joined(_logits_after(base[at], talk[at], shown[at], head) for at, _ in parts),
        **{name: x.cpu() for name, x in figures.items()},
    )


def _mixed_nll(thought: Thoughts, head: LinearHead, input_ids: Tensor) -> Tensor:
    """[P, R, m] of the tokens after each position, 0 where there is none."""
    layout, shape = thought.layout, thought.mix_weight.shape
    every = layout.target_valid[:, :, None].expand(shape)
    targets = input_ids[0][layout.target_index][:, :, None].expand(shape)[every]
    base = thought.base_hidden.expand_as(thought.talk_hidden)[every]
    found = mixed_nll(base, thought.talk_hidden[every], thought.mix_weight[every], head, targets)
    return found.new_zeros(shape).masked_scatter(every, found)[0]


def _logits_after(base: Tensor, talk: Tensor, weight: Tensor, head: LinearHead) -> Tensor:
    """[P, R, V] of base [P, D], talk [P, R, D] and weight [P, R]."""
    flat = base[:, None].expand_as(talk).flatten(0, 1), talk.flatten(0, 1), weight.flatten()
    return mixed_logits(*flat, head).unflatten(0, weight.shape)


def _joined(scores: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """(probabilities, ids) of the likeliest tokens, from logits [P, ..., V] of some positions at a time."""
    values, ids = zip(*(x.softmax(-1).topk(min(SHOWN, x.shape[-1])) for x in scores))
    return torch.cat(values).cpu(), torch.cat(ids).cpu()
