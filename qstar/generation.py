"""Generation: before every token each row thinks, speaks one token of the mixed prediction, and forgets the
thought."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from qstar_kernels.vocabulary import logits
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from qstar.attention import BlockPass
from qstar.cache import SlotCache, TextCache
from qstar.config import QuietStarConfig
from qstar.layout import TextRows
from qstar.model import QuietStarForCausalLM
from qstar.rollout import rollout


@dataclass(frozen=True)
class Generated:
    """tokens [B, S] int64, S new tokens, pad after a row's end; thoughts [B, S, k] int64: what was thought
    before each; mix_weight [B, S] fp32; logits [B, S, V] fp32, the mixed ones, if asked for."""

    tokens: Tensor
    thoughts: Tensor
    mix_weight: Tensor
    logits: Tensor | None = None


@torch.no_grad()
def generate(
    model: QuietStarForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    thought_length: int | None = None,
    thought_temperature: float | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int = 0,
    generator: torch.Generator | None = None,
    return_logits: bool = False,
    on_token: Callable[[Tensor, Tensor], None] | None = None,
) -> Generated:
    """Continue a batch of prompts.

    input_ids [B, T] int64; attention_mask [B, T], 0 on LEFT padding; temperature 0 is argmax; thought_length
    and thought_temperature default to the model's config; on_token is called with (tokens [B], thoughts [B,
    k]). The K/V of the text is kept and that of a thought dropped when its token is chosen: a step equals the
    parallel forward at the last position. Raises ValueError, naming the argument.
    """
    config = _step_config(model.quiet_star, thought_length, thought_temperature)
    _check(model, input_ids, attention_mask, max_new_tokens, temperature, top_p, config)
    was_training = model.training
    model.eval()
    rows = TextRows.from_batch(input_ids, attention_mask) if input_ids.shape[1] > 1 else _one_token(input_ids)
    warpers = LogitsProcessorList()
    if temperature > 0:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
        if top_p < 1:
            warpers.append(TopPLogitsWarper(top_p))

    hidden, keys_values = model.read_text(input_ids, rows)
    hidden = hidden[:, -1]
    text = TextCache(keys_values, input_ids.shape[1] + max_new_tokens)
    start = rows.segment_start[:, -1:]
    embed = model.get_input_embeddings()
    finished = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    tokens: list[Tensor] = []
    thoughts: list[Tensor] = []
    weights: list[Tensor] = []
    kept_logits: list[Tensor] = []
    for _ in range(max_new_tokens):
        thought, talk_hidden = _think(model, text, start, config, generator)
        weight = model.mixing(hidden, talk_hidden)
        w = weight[:, None]
        scores = (1 - w) * logits(hidden, model.head) + w * logits(talk_hidden, model.head)
        if return_logits:
            kept_logits.append(scores)
        token = _choose(warpers(input_ids, scores), temperature, generator)
        token = torch.where(finished, pad_token_id, token)
        for kept, new in ((tokens, token), (thoughts, thought), (weights, weight)):
            kept.append(new)
        if on_token is not None:
            on_token(token, thought)
        if eos_token_id is not None:
            finished |= token == eos_token_id
            if bool(finished.all()):
                break
        hidden = _speak(model, text, start, embed(token)[:, None], config)
    model.train(was_training)
    return Generated(
        tokens=torch.stack(tokens, 1),
        thoughts=torch.stack(thoughts, 1),
        mix_weight=torch.stack(weights, 1),
        logits=torch.stack(kept_logits, 1) if return_logits else None,
    )


def _step_config(config: QuietStarConfig, length: int | None, temperature: float | None) -> QuietStarConfig:
    return replace(
        config,
        num_thoughts=1,
        talk_length=1,
        thought_length=config.thought_length if length is None else length,
        thought_temperature=config.thought_temperature if temperature is None else temperature,
    )


def _check(model, input_ids, attention_mask, max_new_tokens, temperature, top_p, config) -> None:
    if input_ids.ndim != 2 or input_ids.shape[1] < 1:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}: must be [batch, tokens], at least 1 token"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens}: must be at least 1")
    if temperature < 0:
        raise ValueError(f"temperature = {temperature}: must be at least 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p}: must be in (0, 1]")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: must be that of input_ids, "
            f"{tuple(input_ids.shape)}"
        )
    if attention_mask is not None and bool((attention_mask[:, 1:] < attention_mask[:, :-1]).any()):
        raise ValueError("attention_mask: padding must be on the left")
    if attention_mask is not None and not bool(attention_mask[:, -1].all()):
        raise ValueError("attention_mask: a row is empty")
    context = getattr(model.config, "max_position_embeddings", None)
    longest = input_ids.shape[1] + max_new_tokens - 1 + config.slots
    if context is not None and longest > context:
        raise ValueError(
            f"max_new_tokens = {max_new_tokens}: {longest} positions (prompt, new tokens and the thought "
            f"at the last one) exceed the model's context of {context}"
        )


def _one_token(input_ids: Tensor) -> TextRows:
    zero = torch.zeros_like(input_ids)
    return TextRows(zero, zero, zero + 1, torch.ones_like(input_ids, dtype=torch.bool))


def _pass(text: TextCache, start: Tensor, slots: SlotCache, first: int, config: QuietStarConfig) -> BlockPass:
    end = torch.full_like(start, text.tokens)
    return BlockPass(text.read(), start.int(), end.int(), slots, first, config.attention)


def _think(
    model, text: TextCache, start: Tensor, config: QuietStarConfig, generator
) -> tuple[Tensor, Tensor]:
    """One thought for every row after its last token: (tokens [B, k], hidden state at `<end>` [B, D])."""
    B, k = len(start), config.thought_length
    first_position = text.tokens - start  # [B, 1], that of `<start>`

    def read(embeddings: Tensor, first: int, cache: SlotCache) -> Tensor:
        positions = first_position + torch.arange(first, first + embeddings.shape[1], device=start.device)
        return model.read_slots(embeddings, positions, _pass(text, start, cache, first, config))

    slots = SlotCache(k + 2)
    embed = model.get_input_embeddings()
    thought = rollout(
        read_slots=read,
        embed=embed,
        boundary=model.boundary,
        head=model.head,
        blocks=(B, 1),
        thought_length=k,
        cache=slots,
        temperature=config.thought_temperature,
        suppress=model.suppress,
        generator=generator,
    )[:, 0]
    last = embed(thought[:, -1:]) if k else model.boundary.start.expand(B, 1, -1)
    end = model.boundary.end.to(last.dtype).expand(B, 1, -1)
    return thought, read(torch.cat([last, end], dim=1), k, slots)[:, -1]


def _speak(model, text: TextCache, start: Tensor, embedding: Tensor, config: QuietStarConfig) -> Tensor:
    """Feed the chosen token [B, 1, D] as a block of one slot, keep its K/V; its hidden state [B, D]."""
    slots = SlotCache(1)
    hidden = model.read_slots(embedding, text.tokens - start, _pass(text, start, slots, 0, config))
    text.append(slots)
    return hidden[:, -1]


def _choose(scores: Tensor, temperature: float, generator) -> Tensor:
    if temperature == 0:
        return scores.argmax(-1)
    return torch.multinomial(scores.softmax(-1), 1, generator=generator).squeeze(-1)
