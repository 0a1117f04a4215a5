"""QuietStarForCausalLM: any causal LM on transformers' attention interface, taught to think before it
speaks."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from qstar_kernels.vocabulary import LinearHead
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin

from qstar import checkpoint, peft_adapters
from qstar.attention_interface import BlockPass, use_thought_attention
from qstar.base_model import linear_head, read_slots, read_text
from qstar.boundary import BoundaryEmbeddings, boundary_token_id
from qstar.config import QuietStarConfig
from qstar.frozen_writer import FrozenWriter
from qstar.kv_cache import SlotCache, TextKeysValues
from qstar.layout import TextRows, ThoughtLayout
from qstar.mixing import MixingHead
from qstar.profiler_ranges import BLOCKS, LOSS, PREFIX, ROLLOUT, phase
from qstar.rollout import rollout
from qstar.step import QuietStarOutput, Thoughts, training_step
from qstar.supported import check_supported, context_length, text_body

log = logging.getLogger(__name__)


class QuietStarForCausalLM(PreTrainedModel, GenerationMixin):
    """A base model, two boundary embeddings and a mixing head. Build one with `from_base` or
    `from_pretrained`."""

    config_class = PreTrainedConfig
    base_model_prefix = "base"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _supports_attention_backend = True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # asked on behalf of the base model, whose own experts these are

    def __init__(self, base: PreTrainedModel, quiet_star: QuietStarConfig):
        use_thought_attention(base)
        super().__init__(base.config)
        self.base = base
        self.generation_config = base.generation_config
        self.quiet_star = quiet_star
        head = base.get_output_embeddings().weight
        width = base.get_input_embeddings().weight.shape[1]
        self.boundary = BoundaryEmbeddings(width, quiet_star.boundary_scale, head.device)
        self.mixing = MixingHead(head.shape[1], head.device)
        self.register_buffer("suppress", self._suppressed(quiet_star), persistent=False)
        self.writer: FrozenWriter | None = self._frozen_writer(quiet_star)
        self._base_alone = False

    # -- construction and checkpoints
    # ---------------------------------------------------------------------------

    @classmethod
    def from_base(
        cls,
        model_or_path: PreTrainedModel | str | os.PathLike,
        config: QuietStarConfig | None = None,
        tokenizer: Any = None,
        **model_options: Any,
    ) -> QuietStarForCausalLM:
        """Begin from a base model that has never thought: w = 0, `<start>` and `<end>` from an em dash, or
        from the config's start_token and end_token.

        tokenizer: to find these and the special tokens; of a path it is loaded from there. Without one, the
        boundaries begin from the mean embedding, and the model's bos, eos and pad ids are suppressed.
        model_options go to `AutoModelForCausalLM.from_pretrained`. Raises ValueError for an unsupported
        model, and for a start_token or end_token that is no single token (for a dash, another one is taken).
        """
        config = config or QuietStarConfig()
        if isinstance(model_or_path, PreTrainedModel):
            base = model_or_path
        else:
            base = AutoModelForCausalLM.from_pretrained(model_or_path, **model_options)
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(model_or_path)
        check_supported(base)
        if config.suppressed_tokens is None:
            config = replace(config, suppressed_tokens=_special_tokens(base, tokenizer))
        model = cls(base, config)
        found = []
        table = base.get_input_embeddings()
        every = torch.arange(table.weight.shape[0], device=table.weight.device)
        for name in ("start_token", "end_token"):
            text = getattr(config, name)
            token, source = boundary_token_id(tokenizer, name, text)
            if source != text:
                log.warning("%s = %r is no single token of this model: using %s", name, text, source)
            with torch.no_grad():
                found.append(table(every if token is None else every[token : token + 1]).float().mean(0))
        model.boundary.begin_from(*found)
        return model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        state_dict: dict | None = None,
        is_main_process: bool = True,
        **kwargs,
    ) -> None:
        """The base model in its stock format, plus quiet_star.safetensors and quiet_star.json. Of a base
        model with an adapter of peft only the adapter; `merge_adapter` first to have the whole. A crash at
        any moment leaves the previous checkpoint of that folder loadable. Raises ValueError for a model
        sharded by FSDP2 without its whole state_dict."""
        self._check_whole()
        if state_dict is None and any(isinstance(p, DTensor) for p in self.parameters()):
            raise ValueError(
                "state_dict = None: must be given, for the parameters are sharded; get_model_state_dict of "
                "torch.distributed.checkpoint.state_dict makes it, in all processes, with the options "
                "StateDictOptions(full_state_dict=True, cpu_offload=True)"
            )
        if is_main_process:
            checkpoint.save(self, save_directory, state_dict, **kwargs)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, *unused, **model_options) -> QuietStarForCausalLM:  # type: ignore[override]
        """Load what `save_pretrained` wrote; model_options go to `AutoModelForCausalLM.from_pretrained`, of
        an adapter's checkpoint to that of its base model."""
        config, tensors = checkpoint.read(path)
        adapted = (Path(path) / peft_adapters.CONFIG).is_file()
        load = peft_adapters.load if adapted else AutoModelForCausalLM.from_pretrained
        model = cls(load(path, **model_options), config)
        checkpoint.load_thought_parts(model, tensors, path)
        return model

    def merge_adapter(self) -> QuietStarForCausalLM:
        """Add the adapter that peft put into the base model to its weights: a stock model again, to be saved
        whole. Raises ValueError when there is none."""
        if self.writer is not None:
            self.writer.keep(self.base.parameters())
        peft_adapters.merge(self.base)
        return self

    def freeze_base(self, trainable_layers: int = 0) -> QuietStarForCausalLM:
        """From now on only the mixing head and the boundary embeddings learn, and of the base model its last
        `trainable_layers` layers with what follows them (the final norm, not the head). The pass over the
        text keeps no graph of the frozen layers, and no gradient of their weights is computed."""
        layers, norms = _layers(self.base)
        if not 0 <= trainable_layers <= len(layers):
            raise ValueError(f"trainable_layers = {trainable_layers}: must be in [0, {len(layers)}]")
        self.base.requires_grad_(False)
        if trainable_layers:
            for part in (*layers[-trainable_layers:], *norms):
                part.requires_grad_(True)
        return self

    def _frozen_writer(self, config: QuietStarConfig) -> FrozenWriter | None:
        return FrozenWriter(self.base, self.boundary) if config.writer == "base" else None

    def load_state_dict(self, state_dict, *arguments: Any, **options: Any):
        """Also of a base model alone, which a Trainer that resumes has read from our checkpoint: its tensors
        go to the base, and until the thought parts are loaded too, training and saving raise ValueError."""
        own = any(name.startswith(("base.", "boundary.", "mixing.", "writer.")) for name in state_dict)
        self._base_alone = bool(state_dict) and not own
        if self._base_alone:
            state_dict = {f"base.{name}": x for name, x in state_dict.items()}
        return super().load_state_dict(state_dict, *arguments, **options)

    def _check_whole(self) -> None:
        if self._base_alone:
            raise ValueError(
                "load_state_dict: its last tensors were of a base model alone, without the thought parts "
                "beside it; a Trainer loads both after trainer.add_callback(QuietStarCallback(trainer))"
            )

    def with_config(self, config: QuietStarConfig) -> QuietStarForCausalLM:
        """This model, from now on with other knobs; the suppressed tokens stay unless the config names its
        own, and so does the frozen writer. Where there was none, writer = "base" is the base model of now.

        Raises ValueError for another boundary_scale: the embeddings are stored divided by it.
        """
        own = self.quiet_star
        if config.boundary_scale != own.boundary_scale:
            raise ValueError(f"boundary_scale = {config.boundary_scale}: this model has {own.boundary_scale}")
        if config.suppressed_tokens is None:
            config = replace(config, suppressed_tokens=own.suppressed_tokens)
        self.quiet_star = config
        self.suppress = self._suppressed(config)
        if (self.writer is None) != (config.writer == "self"):
            self.writer = self._frozen_writer(config)
        return self

    def _suppressed(self, config: QuietStarConfig) -> Tensor:
        weight = self.base.get_output_embeddings().weight
        ids = sorted(config.suppressed_tokens or ())
        if len(ids) >= len(weight) or any(not 0 <= token < len(weight) for token in ids):
            raise ValueError(f"suppressed_tokens = {ids}: must be a part of [0, {len(weight)})")
        return torch.tensor(ids, dtype=torch.long, device=weight.device)

    def get_input_embeddings(self):
        return self.base.get_input_embeddings()

    def get_output_embeddings(self):
        return self.base.get_output_embeddings()

    @property
    def head(self) -> LinearHead:
        """The base model's map from hidden states to logits."""
        return linear_head(self.base)

    @property
    def author(self) -> tuple[PreTrainedModel, BoundaryEmbeddings]:
        """The base model and the boundary embeddings that thoughts are written with."""
        part = self if self.writer is None else self.writer
        return part.base, part.boundary

    # -- the passes
    # ---------------------------------------------------------------------------------------------

    def read_text(self, input_ids: Tensor, rows: TextRows) -> tuple[Tensor, TextKeysValues]:
        """The base model over the text [B, T]: hidden states [B, T, D] after the final norm, and K/V by
        layer. Raises ValueError for an id outside the vocabulary (on a GPU the lookup itself asserts)."""
        rows_of_table = self.get_input_embeddings().weight.shape[0]
        if not input_ids.is_cuda and bool(((input_ids < 0) | (input_ids >= rows_of_table)).any()):
            wrong = input_ids[(input_ids < 0) | (input_ids >= rows_of_table)]
            raise ValueError(f"input_ids = {int(wrong[0])}: must be in [0, {rows_of_table})")
        with phase(PREFIX):
            return read_text(self.base, input_ids, rows)

    @torch.no_grad()
    def authors_text(self, input_ids: Tensor, rows: TextRows, text: TextKeysValues) -> TextKeysValues:
        """K/V of the text as the author of the thoughts reads it: `text`, the model's own, detached; a frozen
        writer reads it anew."""
        if self.writer is None:
            return tuple((k.detach(), v.detach()) for k, v in text)
        with phase(ROLLOUT):
            return read_text(self.writer.base, input_ids, rows)[1]

    def read_slots(self, embeddings: Tensor, position_ids: Tensor, block_pass: BlockPass) -> Tensor:
        """Slots of all blocks, embeddings [B, N * Lq, D] at position_ids [B, N * Lq] -> hidden states
        alike."""
        return read_slots(self.base, embeddings, position_ids, block_pass)

    def think(
        self,
        input_ids: Tensor,
        text_hidden: Tensor,
        text: TextKeysValues,
        layout: ThoughtLayout,
        config: QuietStarConfig | None = None,
        thoughts: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Thoughts:
        """Sample thoughts at the layout's positions (or take `thoughts` [B, P, R, k]) and read them with
        gradient.

        input_ids [B, T], of which the talk tokens are fed; text_hidden [B, T, D] and text from `read_text`.
        """
        config = config or self.quiet_star
        if thoughts is None:
            written_on = self.authors_text(input_ids, layout.rows, text)
            thoughts = self.sample_thoughts(written_on, layout, config, generator)
        return self.read_thoughts(input_ids, text_hidden, text, layout, thoughts, config)

    def read_thoughts(
        self,
        input_ids: Tensor,
        text_hidden: Tensor,
        text: TextKeysValues,
        layout: ThoughtLayout,
        thoughts: Tensor,
        config: QuietStarConfig,
    ) -> Thoughts:
        """All slots of given thoughts [B, P, R, k] in one pass, with gradient; see `think`."""
        k, m, L, R = config.thought_length, config.talk_length, config.slots, layout.num_thoughts
        B, P = layout.positions.shape
        N = P * R
        if thoughts.shape != (B, P, R, k):
            raise ValueError(
                f"thoughts has shape {tuple(thoughts.shape)}: must be [B, P, R, k] = {(B, P, R, k)}"
            )
        block_pass = BlockPass(text, layout.prefix_start, layout.prefix_end, impl=config.attention)
        with phase(BLOCKS):
            talk = input_ids.gather(1, layout.talk_index[:, :, 1:].reshape(B, -1)).view(B, P, 1, m - 1)
            written = torch.cat([thoughts, talk.expand(B, P, R, m - 1)], dim=-1).view(B, N, k + m - 1)
            tokens = self.base.get_input_embeddings()(written)
            start, end = (
                x.to(tokens.dtype).expand(B, N, 1, -1) for x in (self.boundary.start, self.boundary.end)
            )
            slots = torch.cat([start, tokens[:, :, :k], end, tokens[:, :, k:]], dim=2)
            hidden = self.read_slots(slots.flatten(1, 2), layout.slot_position_ids.flatten(1), block_pass)
        hidden = hidden.view(B, P, R, L, -1)
        talk_hidden = hidden[..., k + 1 :, :]
        rows = torch.arange(B, device=input_ids.device)[:, None, None]
        base_hidden = text_hidden[rows, layout.talk_index][:, :, None]
        with phase(LOSS):
            weight = self.mixing(base_hidden.expand(B, P, R, m, -1), talk_hidden)
        return Thoughts(layout, thoughts, hidden, talk_hidden, base_hidden, weight)

    @torch.no_grad()
    def sample_thoughts(
        self,
        text: TextKeysValues,
        layout: ThoughtLayout,
        config: QuietStarConfig,
        generator: torch.Generator | None = None,
        uniform: Tensor | None = None,
    ) -> Tensor:
        """Thoughts [B, P, R, k] int64 at the layout's positions, from `generator` or from the numbers uniform
        [k, B, P * R] fp64 in [0, 1); text from `authors_text`."""
        base, boundary = self.author
        whole = BlockPass(text, layout.prefix_start, layout.prefix_end, impl=config.attention)

        def read(embeddings: Tensor, first: int, cache: SlotCache) -> Tensor:
            step = replace(whole, slots=cache, first=first)
            return read_slots(base, embeddings, layout.slot_position_ids[:, :, first], step)

        with phase(ROLLOUT):
            found = rollout(
                read_slots=read,
                embed=base.get_input_embeddings(),
                boundary=boundary,
                head=linear_head(base),
                blocks=tuple(layout.prefix_end.shape),  # type: ignore[arg-type]
                thought_length=config.thought_length,
                cache=SlotCache(config.thought_length),
                temperature=config.thought_temperature,
                suppress=self.suppress,
                generator=generator,
                uniform=uniform,
            )
        return found.view(*layout.positions.shape, layout.num_thoughts, -1)

    def generate(self, inputs: Tensor | None = None, generation_config=None, **options: Any):  # type: ignore[override]
        """Continue a batch of prompts, thinking before its tokens.

        As transformers' own `generate`: inputs or input_ids [B, T] int64; a GenerationConfig or its options
        (max_new_tokens, do_sample, temperature, top_k, top_p, min_p, repetition_penalty, eos_token_id,
        stop_strings with tokenizer, num_return_sequences, return_dict_in_generate ...), attention_mask [B, T]
        with 0 on LEFT padding, logits_processor (functions of the text alone: drafts are asked about twice),
        stopping_criteria (asked for one row at a time), streamer.
        Besides:

        think: "always"; "adaptive", where the entropy of the base prediction exceeds entropy_threshold (nats,
        default the config's, which `qstar calibrate` sets); "never". draft_length: tokens that are drafted
        and then thought about at once, which changes nothing but the speed; None adapts it, 0 thinks about
        one token at a time. thought_length, thought_temperature: default the config's. truncate_prompt: cut
        a prompt that is too long, instead of ValueError. generator: source of thoughts and tokens.
        on_token(row, token, thought or None): called as soon as a token is certain; on_finished(row): when
        the row has ended.

        Returns [B, T + S] int64, or a `QuietStarGenerateOutput` with return_dict_in_generate. Beam search and
        other modes raise ValueError.
        """
        from qstar.generation import generate

        return generate(self, inputs, generation_config, **options)

    # -- the training step
    # --------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        thoughts: Tensor | None = None,
        think_mask: Tensor | None = None,
    ) -> QuietStarOutput:
        """One training step's loss and metrics.

        input_ids [B, T] int64; attention_mask [B, T], 0 on padding at either side; labels [B, T], -100 where
        not a target (default: input_ids wherever attention_mask is 1); position_ids [B, T] only for packed
        documents; generator: source of the thoughts (default: torch's own), in the same state in all
        processes of torch.distributed (`qstar.distributed_random`); num_items_in_batch: of the whole batch,
        accumulated or of several processes, that this is a part of: its targets, by whose share this loss is
        weighted,
        or the sum of `count_items` over its parts, with which the losses of the parts add up to exactly that
        of the whole; thoughts [B, P, R, k]: take these, sample none; think_mask [B, T]: think after the
        tokens where it is not 0 and a target follows, whatever the config's thinking_positions. Raises
        ValueError for a text that is too short, or too long with its thoughts for the model's context, and a
        think_mask that leaves no position to think at.
        """
        self._check(input_ids)
        if self.writer is not None and torch.is_grad_enabled():  # a model may learn in evaluation mode too
            self.writer.keep(p for p in self.parameters() if p.requires_grad)
        return training_step(
            self,
            input_ids,
            attention_mask,
            labels,
            generator,
            position_ids,
            num_items_in_batch,
            thoughts,
            think_mask,
        )

    def count_items(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        think_mask: Tensor | None = None,
    ) -> Tensor:
        """What the means of a batch's loss are over, [m + 2] int64: targets, targets of each talk step,
        rewarded positions (if all think, or those of think_mask). Arguments as of `forward`."""
        rows = TextRows.from_batch(input_ids, attention_mask, position_ids)
        return rows.items(rows.labels(input_ids, labels), self.quiet_star.talk_length, think_mask)

    def check_length(
        self, tokens: int, name: str = "input_ids", config: QuietStarConfig | None = None
    ) -> None:
        """Raises ValueError, naming `name`, for a text too long with its thoughts for the model's context."""
        slots = (config or self.quiet_star).slots
        context = context_length(self.base.config)
        if context is not None and tokens - 1 + slots > context:
            raise ValueError(
                f"{name} has {tokens} tokens: with {slots} slots for a thought and its talk tokens, "
                f"{tokens - 1 + slots} positions exceed the model's context of {context}"
            )

    def _check(self, input_ids: Tensor) -> None:
        self._check_whole()
        T, config = input_ids.shape[1], self.quiet_star
        if config.talk_length >= T:
            raise ValueError(
                f"input_ids has {T} tokens: a text must be longer than talk_length = {config.talk_length}"
            )
        self.check_length(T)
        if self.writer is not None and isinstance(self, FSDPModule):
            raise ValueError(
                "writer = 'base': must be 'self' under FSDP2, which cannot shard the weights that both share"
            )
        if not self.training:
            return
        learning = [p for p in self.base.parameters() if p.requires_grad]
        if isinstance(self, FSDPModule):  # what is gathered now may be a copy in a lower precision
            learning = [p for p in learning if isinstance(p, DTensor)]
        low = {p.dtype for p in learning} & {torch.bfloat16, torch.float16}
        if low:
            warnings.warn(
                f"the base model's parameters are {low.pop()}: at small learning rates most of them never "
                "change; load it in float32 and train with bf16 mixed precision",
                stacklevel=3,
            )
        for module in self.base.modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(module, "gradient_checkpointing", False) and function is not None:
                if getattr(function, "keywords", {}).get("use_reentrant", False):
                    raise ValueError(
                        "gradient checkpointing use_reentrant = True: must be False, it loses gradients"
                    )
                break


def _layers(base: PreTrainedModel) -> tuple[nn.ModuleList, list[nn.Module]]:
    """The layers of a base model, in order, and the norm after them (a norm has vectors alone)."""
    count = base.config.num_hidden_layers
    for module in text_body(base).modules():
        parts = dict(module.named_children())
        for part in parts.values():
            if isinstance(part, nn.ModuleList) and len(part) == count:
                norms = [
                    x for n, x in parts.items() if "emb" not in n and all(p.ndim == 1 for p in x.parameters())
                ]
                return part, norms
    raise ValueError(f"model_type = {base.config.model_type!r}: its {count} layers are in no one list")


@contextmanager
def in_eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module's own mode again afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _special_tokens(base: PreTrainedModel, tokenizer) -> list[int]:
    """Ids that must not occur inside a thought: the tokenizer's special tokens, else those the model
    names."""
    if tokenizer is not None:
        ids = set(tokenizer.all_special_ids)
    else:
        named = [getattr(base.config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
        ids = {i for value in named for i in (value if isinstance(value, list) else [value]) if i is not None}
    return sorted(i for i in ids if 0 <= i < base.get_output_embeddings().weight.shape[0])
