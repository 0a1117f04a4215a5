"""Let a model think after every token of one text, and see what it predicts before and after thinking.

Legend: T tokens, R thoughts per position, k thought tokens, m talk tokens, K predictions shown, D width.
"""

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
POSITIONS = 128  # read at once: bounds the memory of a long text
NOTICED = 0.01  # nats: a smaller gain or loss is not worth showing


@dataclass(frozen=True)
class Look:
    """Figures of each position: position t comes after x_t and predicts x_{t+1}, which the last one lacks. On
    the CPU; NLLs in nats.

    token [T] and thought [T, R, k] int64; base_nll [T - 1]; mixed_nll, alone_nll (w = 1) and shuffled_nll
    (after the thought of another position) [T - 1, R]; mix_weight [T, R] of the next token; reward [T - 1, R]
    over the next m tokens, or those that the text still has; before [T, K] and after [T, R, K]:
    (probabilities, ids) of the likeliest tokens without and with a thought. silent: w is 0 everywhere; then
    `after` is at w = 1.
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
        """Base NLL minus mixed NLL [T - 1], the mean over the thoughts of a position."""
        return self.base_nll - self.mixed_nll.mean(1)

    def summary(self) -> dict[str, float]:
        """Return means over the predicted tokens, in nats per token, and the shares of them that gain or lose
        more than NOTICED."""
        means = ("base_nll", "mixed_nll", "shuffled_nll", "alone_nll", "gain")
        return {
            "tokens": len(self.token),
            **{name: float(getattr(self, name).mean()) for name in means},
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
    """Return the model's config with the given options, thinking everywhere; num_thoughts is 1 by default at
    temperature 0. Raises ValueError for several thoughts there, which would all be the same."""
    temperature = config.thought_temperature if thought_temperature is None else thought_temperature
    if temperature == 0 and (num_thoughts or 1) > 1:
        raise ValueError(f"num_thoughts = {num_thoughts}: must be 1 if thought_temperature is 0")
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
    """Let the model think R times after each of ids [T], the last one too.

    config: from `look_config`; generator draws the thoughts, and where each goes for shuffled_nll. Raises
    ValueError for fewer than two ids, or more than fit the model's context with a thought after the last one.
    """
    config = config or look_config(model.quiet_star)
    if len(ids) < 2:
        raise ValueError(f"text has {len(ids)} tokens: must have at least 2")
    model.check_length(len(ids) + 1, "text, with the token to come,", config)
    with in_eval_mode(model):
        return _look(model, torch.tensor([ids], device=model.device), config, generator)


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

    def read(thoughts: Tensor, what: str) -> tuple[Tensor, ...]:
        """Return h_talk [T, R, D] and w [T, R] of the next token, and NLLs [T, R, m], of thoughts
        [1, T, R, k]."""
        found = []
        for at, part in tqdm(parts, f"look: {what}", leave=False):
            x = thinker.read_thoughts(input_ids, hidden, text, part, thoughts[:, at])
            mixed = _mixed_nll(x, head, input_ids)
            found.append((x.talk_hidden[0, :, :, 0], x.mix_weight[0, :, :, 0], mixed))
        return tuple(torch.cat(x) for x in zip(*found))

    written = tqdm(parts, "look: write thoughts", leave=False)
    own = torch.cat([thinker.sample_thoughts(written_on, part, generator) for _, part in written], 1)
    talk, weight, mixed = read(own, "read thoughts")
    *_, others = read(shuffled(own, valid, generator), "read shuffled thoughts")
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
    """Return the NLL [P, R, m] of the tokens after each position, 0 where there is none."""
    layout, shape = thought.layout, thought.mix_weight.shape
    every = layout.target_valid[:, :, None].expand(shape)
    targets = input_ids[0][layout.target_index][:, :, None].expand(shape)[every]
    base = thought.base_hidden.expand_as(thought.talk_hidden)[every]
    found = mixed_nll(base, thought.talk_hidden[every], thought.mix_weight[every], head, targets)
    return found.new_zeros(shape).masked_scatter(every, found)[0]


def _logits_after(base: Tensor, talk: Tensor, weight: Tensor, head: LinearHead) -> Tensor:
    """Mix base [P, D] and talk [P, R, D] by weight [P, R] into logits [P, R, V]."""
    flat = base[:, None].expand_as(talk).flatten(0, 1), talk.flatten(0, 1), weight.flatten()
    return mixed_logits(*flat, head).unflatten(0, weight.shape)


def _joined(scores: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the probabilities and ids of the likeliest tokens; scores: logits [P, ..., V] of some positions
    at a time."""
    values, ids = zip(*(x.softmax(-1).topk(min(SHOWN, x.shape[-1])) for x in scores))
    return torch.cat(values).cpu(), torch.cat(ids).cpu()
