"""Generate by transformers' conventions; `loop` does the work.

transformers itself merges the generation config, finds padding, repeats prompts for num_return_sequences and
builds the logits processors and stopping criteria; our loop takes the place of its own (`custom_generate`).
"""

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
    SynthIDTextWatermarkingConfig,
)
from transformers.generation import GenerationMixin
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from qstar.base_model import in_eval_mode
from qstar.config import QuietStarConfig
from qstar.generation.loop import THINK, Counts, Generation, OnFinished, OnToken, ThoughtSchedule, Written
from qstar.supported import context_length
from qstar.thinker import Thinker

log = logging.getLogger(__name__)
NEW_TOKENS = 20  # transformers' own number, where nothing is said
# what a generation config may ask for that this loop does not do: (name, what it is when unused)
UNSUPPORTED = (
    ("num_beams", 1),
    ("num_beam_groups", 1),
    ("penalty_alpha", None),
    ("dola_layers", None),
    ("guidance_scale", None),
    ("prompt_lookup_num_tokens", None),
    ("assistant_early_exit", None),
    ("constraints", None),
    ("force_words_ids", None),
    ("output_attentions", False),
    ("output_hidden_states", False),
)


# what transformers would hand to its own loop, or take in silence
IGNORED = (
    "labels",
    "position_ids",
    "past_key_values",
    "inputs_embeds",
    "assistant_model",
    "negative_prompt_ids",
)


@dataclass
class QuietStarGenerateOutput(ModelOutput):
    """sequences [B, T + S] int64: prompts and new_tokens [B, S], pad after a row's end. Of these: thoughts
    [B, S, k] int64, -1 where the row did not think or had ended; mix_weight [B, S] fp32, 0 there;
    base_logprobs, mixed_logprobs [B, S] fp32, of the token under the unprocessed predictions without and with
    the thought, 0 after the end; scores, logits [B, S, V] fp32, the mixed prediction processed and not, if
    asked for. counts: what it took.
    """

    sequences: Tensor = None  # type: ignore[assignment]
    thoughts: Tensor = None  # type: ignore[assignment]
    mix_weight: Tensor = None  # type: ignore[assignment]
    base_logprobs: Tensor = None  # type: ignore[assignment]
    mixed_logprobs: Tensor = None  # type: ignore[assignment]
    scores: Tensor | None = None
    logits: Tensor | None = None
    counts: dict[str, int] | None = None

    @property
    def new_tokens(self) -> Tensor:
        return self.sequences[:, self.sequences.shape[1] - self.thoughts.shape[1] :]


@torch.no_grad()
def generate(
    model,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    input_ids: Tensor | None = None,
    think: str = "always",
    draft_length: int | None = None,
    entropy_threshold: float | None = None,
    thought_length: int | None = None,
    thought_temperature: float | None = None,
    truncate_prompt: bool = False,
    generator: torch.Generator | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    streamer: BaseStreamer | None = None,
    on_token: OnToken | None = None,
    on_finished: OnFinished | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> Tensor | QuietStarGenerateOutput:
    """See `QuietStarForCausalLM.generate`."""
    thinker = _with_thoughts(model.thinker, thought_length, thought_temperature)
    schedule = _schedule(thinker.config, think, draft_length, entropy_threshold)
    if (inputs is None) == (input_ids is None):
        raise ValueError("inputs, input_ids: give exactly one of them")
    input_ids = inputs if input_ids is None else input_ids
    assert input_ids is not None
    if input_ids.ndim != 2 or input_ids.shape[1] < 1:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}: must be [batch, tokens], at least 1 token"
        )
    for name in IGNORED:
        if options.get(name) is not None:
            raise ValueError(f"{name}: is not used by this generator")
    mask = options.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(input_ids)  # else transformers would guess it from padding ids
    _check_mask(input_ids, mask)
    lengths = [options, vars(generation_config or GenerationConfig()), vars(model.generation_config)]
    if all(x.get(name) is None for x in lengths for name in ("max_new_tokens", "max_length")):
        options["max_new_tokens"] = NEW_TOKENS
    config, _ = model._prepare_generation_config(generation_config, **options)
    for name, unused in UNSUPPORTED:
        if getattr(config, name, None) not in (unused, None):
            raise ValueError(f"{name} = {getattr(config, name)}: is not supported by this generator")
    if isinstance(config.watermarking_config, SynthIDTextWatermarkingConfig):
        raise ValueError(
            "watermarking_config: SynthID counts its calls, and drafted tokens are asked about twice"
        )
    if streamer is not None and input_ids.shape[0] * (config.num_return_sequences or 1) > 1:
        raise ValueError("streamer: streams one sequence; there are more (on_token tells the row)")
    criteria = StoppingCriteriaList(stopping_criteria or [])
    if config.stop_strings is not None:
        # transformers hands the tokenizer to its own loops alone
        if tokenizer is None:
            raise ValueError(f"tokenizer = None: stop_strings = {config.stop_strings!r} need it")
        criteria.append(StopStringCriteria(tokenizer, config.stop_strings))
        options["stop_strings"] = None
    fitted, options["attention_mask"], new = _fitted(
        thinker, input_ids, mask, config, schedule, truncate_prompt
    )
    if fitted.shape != input_ids.shape:  # a max_length counted the whole prompt
        options |= {"max_new_tokens": new, "max_length": None}
    with in_eval_mode(model):
        return GenerationMixin.generate(
            model,
            fitted,
            generation_config,
            stopping_criteria=criteria,
            streamer=streamer,
            custom_generate=_Loop(thinker, schedule, generator, streamer, on_token, on_finished),
            **options,
        )


class _Loop:
    """Stand in for transformers' own loop (its `custom_generate`)."""

    def __init__(
        self, thinker: Thinker, schedule: ThoughtSchedule, generator, streamer, on_token, on_finished
    ):
        self.thinker, self.schedule = thinker, schedule
        self.generator, self.streamer = generator, streamer
        self.on_token, self.on_finished = on_token, on_finished

    def __call__(
        self,
        model,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | QuietStarGenerateOutput:
        c = generation_config
        keep = tuple(name for name in ("logits", "scores") if getattr(c, f"output_{name}"))
        loop = Generation(
            self.thinker,
            input_ids,
            model_kwargs.get("attention_mask"),
            self.schedule,
            logits_processor,
            stopping_criteria,
            c.max_length,
            c.do_sample,
            self.generator,
            keep,
            self._tell,
            self.on_finished,
            _ids_of(c.eos_token_id),
        )
        written = loop.run()
        if self.streamer is not None:
            self.streamer.end()
        pad = c.pad_token_id if c.pad_token_id is not None else 0
        out = _collected(input_ids, written, self.thinker.config.thought_length, pad, keep, loop.counts)
        return out if c.return_dict_in_generate else out.sequences

    def _tell(self, row: int, token: int, thought: list[int] | None) -> None:
        if self.streamer is not None:
            self.streamer.put(torch.tensor([token]))
        if self.on_token is not None:
            self.on_token(row, token, thought)


def _ids_of(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [int(value)]


def _collected(
    input_ids: Tensor, written: list[Written], k: int, pad: int, keep: tuple[str, ...], counts: Counts
) -> QuietStarGenerateOutput:
    S, device = max(len(row.tokens) for row in written), input_ids.device

    def padded(name: str, empty: Any) -> Tensor:
        rows = [getattr(row, name) for row in written]
        return torch.tensor([[*row, *[empty] * (S - len(row))] for row in rows], device=device)

    def stacked(name: str) -> Tensor | None:
        if name not in keep:
            return None
        rows = [torch.stack(getattr(row, name)) for row in written]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    thoughts = [[c or [-1] * k for c in row.thoughts] + [[-1] * k] * (S - len(row.tokens)) for row in written]
    return QuietStarGenerateOutput(
        sequences=torch.cat([input_ids, padded("tokens", pad)], 1),
        thoughts=torch.tensor(thoughts, dtype=torch.long, device=device).view(len(written), S, k),
        mix_weight=padded("weights", 0.0),
        base_logprobs=padded("base_logprobs", 0.0),
        mixed_logprobs=padded("mixed_logprobs", 0.0),
        scores=stacked("scores"),
        logits=stacked("logits"),
        counts=vars(counts) | {"tokens": sum(len(row.tokens) for row in written)},
    )


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} = {value!r}: must be {allowed}")


def _with_thoughts(thinker: Thinker, length: int | None, temperature: float | None) -> Thinker:
    """Give the thoughts another length and temperature, where those are not None."""
    config = thinker.config
    k = config.thought_length if length is None else length
    temperature = config.thought_temperature if temperature is None else temperature
    _require(k >= 0, "thought_length", k, "at least 0")
    _require(temperature >= 0, "thought_temperature", temperature, "at least 0")
    # a chunk bounds the memory of training alone, and might be too small for longer thoughts
    config = replace(config, thought_length=k, thought_temperature=temperature, block_chunk=None)
    return replace(thinker, config=config)


def _schedule(
    config: QuietStarConfig, think: str, draft_length: int | None, entropy_threshold: float | None
) -> ThoughtSchedule:
    if entropy_threshold is None:
        entropy_threshold = config.entropy_threshold
    _require(think in THINK, "think", think, f"one of {', '.join(THINK)}")
    _require(draft_length is None or draft_length >= 0, "draft_length", draft_length, "at least 0, or None")
    if think == "adaptive":
        allowed = "set, here or by `qstar calibrate`, for think = 'adaptive'"
        _require(entropy_threshold is not None, "entropy_threshold", entropy_threshold, allowed)
        is_number = entropy_threshold == entropy_threshold  # NaN equals nothing
        _require(is_number, "entropy_threshold", entropy_threshold, "a number")
    return ThoughtSchedule(think, entropy_threshold, draft_length)


def _check_mask(input_ids: Tensor, mask: Tensor) -> None:
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}: must be that of input_ids, "
            f"{tuple(input_ids.shape)}"
        )
    if bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise ValueError("attention_mask: padding must be on the left")
    if not bool(mask[:, -1].all()):
        raise ValueError("attention_mask: a row is empty")


def _fitted(
    thinker: Thinker,
    input_ids: Tensor,
    mask: Tensor,
    config: GenerationConfig,
    schedule: ThoughtSchedule,
    truncate: bool,
) -> tuple[Tensor, Tensor, int]:
    """The prompt and its mask, cut on the left where they do not fit the context with the new tokens and a
    thought, and that was asked for; and the number of new tokens."""
    T, context = input_ids.shape[1], context_length(thinker.base.config)
    new = config.max_new_tokens
    if new is None:
        new = config.max_length - T
    if new < 1:
        raise ValueError(f"max_new_tokens = {new}: must be at least 1")
    slots = 0 if schedule.think == "never" else thinker.config.thought_length + 2
    longest = T + new - 1 + slots
    if context is None or longest <= context:
        return input_ids, mask, new
    fits = context - (longest - T)
    if not truncate or fits < 1:
        raise ValueError(
            f"max_new_tokens = {new}: {longest} positions (a prompt of {T}, new tokens and the thought at "
            f"the last one) exceed the model's context of {context}"
        )
    log.warning("the prompt of %d tokens is cut to its last %d: the model's context is %d", T, fits, context)
    return input_ids[:, -fits:], mask[:, -fits:], new
