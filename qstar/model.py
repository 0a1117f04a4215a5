"""Give a model that thinks the face that transformers knows: construction, checkpoints, forward, generate."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from qstar_kernels.vocabulary import LinearHead
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin

from qstar import checkpoint, peft_adapters
from qstar.attention_interface import use_thought_attention
from qstar.base_model import (
    check_reentrant_checkpointing,
    layers_and_norms,
    linear_head,
    special_tokens,
)
from qstar.boundary import BoundaryEmbeddings, boundary_token_id
from qstar.config import QuietStarConfig
from qstar.frozen_writer import FrozenWriter
from qstar.generation import generate
from qstar.layout import TextRows
from qstar.mixing import MixingHead
from qstar.step import QuietStarOutput, training_step
from qstar.supported import check_supported, context_length
from qstar.thinker import Thinker

log = logging.getLogger(__name__)


class QuietStarForCausalLM(PreTrainedModel, GenerationMixin):
    """Hold a base model, two boundary embeddings and a mixing head. Build one with `from_base` or
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

    @property
    def thinker(self) -> Thinker:
        """The parts that think, as they are now."""
        return Thinker(self.base, self.boundary, self.mixing, self.writer, self.suppress, self.quiet_star)

    def linear_head(self) -> LinearHead:
        """Return the base model's map from hidden states to logits; see `base_model.linear_head`."""
        return linear_head(self.base)

    @classmethod
    def from_base(
        cls,
        model_or_path: PreTrainedModel | str | os.PathLike,
        config: QuietStarConfig | None = None,
        tokenizer: Any = None,
        **model_options: Any,
    ) -> QuietStarForCausalLM:
        """Start from a base model that has never thought: w = 0, and `<start>` and `<end>` embedded as the
        config's start_token and end_token (em dashes).

        tokenizer: finds these two and the special tokens; for a path it is loaded from there. Without one,
        the boundaries start from the mean embedding, and the model's bos, eos and pad ids are suppressed.
        model_options go to `AutoModelForCausalLM.from_pretrained`. Raises ValueError for an unsupported
        model, and for a start_token or end_token that is not one token (a dash is replaced by another one).
        """
        config = config or QuietStarConfig()
        if isinstance(model_or_path, PreTrainedModel):
            base = model_or_path
        else:
            base = AutoModelForCausalLM.from_pretrained(model_or_path, **model_options)
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(model_or_path)
        check_supported(base)
        if config.suppressed_tokens is None:
            config = replace(config, suppressed_tokens=special_tokens(base, tokenizer))
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
        """Save the base model in its stock format, plus quiet_star.safetensors and quiet_star.json.

        Of a base model with a peft adapter only the adapter is saved; call `merge_adapter` first for the
        whole. A crash at any moment leaves the previous checkpoint in that folder loadable. Raises ValueError
        for a model sharded by FSDP2 without its whole state_dict.
        """
        self._check_whole()
        if state_dict is None and any(isinstance(p, DTensor) for p in self.parameters()):
            raise ValueError(
                "state_dict = None: must be given for sharded parameters; call get_model_state_dict of "
                "torch.distributed.checkpoint.state_dict in all processes, with the options "
                "StateDictOptions(full_state_dict=True, cpu_offload=True)"
            )
        if is_main_process:
            state = self.state_dict() if state_dict is None else state_dict
            checkpoint.save(save_directory, self.base, state, self.quiet_star, **kwargs)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, *unused, **model_options) -> QuietStarForCausalLM:  # type: ignore[override]
        """Load what `save_pretrained` wrote; model_options go to the base model's own `from_pretrained`."""
        config, tensors = checkpoint.read(path)
        adapted = (Path(path) / peft_adapters.CONFIG).is_file()
        load = peft_adapters.load if adapted else AutoModelForCausalLM.from_pretrained
        model = cls(load(path, **model_options), config)
        own = {n: x for n, x in model.state_dict().items() if n.startswith(checkpoint.THOUGHT_PARTS)}
        # a frozen writer has tensors of its own only for what has learned
        learned = {} if model.writer is None else dict(model.writer.named_parameters(prefix="writer"))
        checkpoint.check_fits(tensors, own, learned, path)
        model.load_state_dict(tensors, strict=False)
        return model

    def merge_adapter(self) -> QuietStarForCausalLM:
        """Merge the peft adapter in the base model into its weights, so that it is a stock model again and is
        saved whole. Raises ValueError where there is none."""
        if self.writer is not None:
            self.writer.keep(self.base.parameters())
        peft_adapters.merge(self.base)
        return self

    def freeze_base(self, trainable_layers: int = 0) -> QuietStarForCausalLM:
        """Train only the mixing head, the boundary embeddings and the base model's last `trainable_layers`
        layers with the norm after them (not the head).

        The pass over the text keeps no graph of the frozen layers, and no gradient of their weights is
        computed. Raises ValueError for more layers than there are.
        """
        layers, norms = layers_and_norms(self.base)
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
        """Load tensors of this model, or of a base model alone, which is what a Trainer that resumes reads
        from our checkpoint. Until the thought parts are loaded too, training and saving raise ValueError."""
        own = any(name.startswith(("base.", "boundary.", "mixing.", "writer.")) for name in state_dict)
        self._base_alone = bool(state_dict) and not own
        if self._base_alone:
            state_dict = {f"base.{name}": x for name, x in state_dict.items()}
        return super().load_state_dict(state_dict, *arguments, **options)

    def _check_whole(self) -> None:
        if self._base_alone:
            raise ValueError(
                "load_state_dict: the last tensors were those of a base model alone, without its thought "
                "parts; a Trainer loads both after trainer.add_callback(QuietStarCallback(trainer))"
            )

    def with_config(self, config: QuietStarConfig) -> QuietStarForCausalLM:
        """Change the config of this model in place, and return the model.

        The suppressed tokens stay unless the config names its own. A frozen writer stays; where there is
        none, writer = "base" freezes the base model as it is now. Raises ValueError for another
        boundary_scale: the embeddings are stored divided by it.
        """
        own = self.quiet_star
        if config.boundary_scale != own.boundary_scale:
            raise ValueError(
                f"boundary_scale = {config.boundary_scale}: must be this model's, {own.boundary_scale}"
            )
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
            raise ValueError(f"suppressed_tokens = {ids}: must be some ids in [0, {len(weight)})")
        return torch.tensor(ids, dtype=torch.long, device=weight.device)

    def get_input_embeddings(self):
        return self.base.get_input_embeddings()

    def get_output_embeddings(self):
        return self.base.get_output_embeddings()

    def generate(self, inputs: Tensor | None = None, generation_config=None, **options: Any):  # type: ignore[override]
        """Continue a batch of prompts, thinking before the tokens.

        As transformers' own `generate`: inputs or input_ids [B, T] int64; a GenerationConfig or its options
        (max_new_tokens, do_sample, temperature, top_k, top_p, min_p, repetition_penalty, eos_token_id,
        stop_strings with tokenizer, num_return_sequences, return_dict_in_generate ...), attention_mask [B, T]
        with 0 on LEFT padding, logits_processor (functions of the text alone: drafts are asked about twice),
        stopping_criteria (asked for one row at a time), streamer.
        Besides:

        think: "always"; "adaptive", where the entropy of the base prediction exceeds entropy_threshold (nats,
        default the config's, which `qstar calibrate` sets); "never". draft_length: tokens that are drafted
        and then thought about at once, which changes only the speed; None adapts it, 0 thinks about one token
        at a time. thought_length, thought_temperature: default the config's. truncate_prompt: cut a prompt
        that is too long, instead of raising ValueError. generator: source of thoughts and tokens.
        on_token(row, token, thought or None): called as soon as a token is certain; on_finished(row): when
        the row has ended.

        Returns [B, T + S] int64, or a `QuietStarGenerateOutput` with return_dict_in_generate. Beam search and
        other modes raise ValueError.
        """
        return generate(self, inputs, generation_config, **options)

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
        """Compute the loss and the metrics of one training step.

        input_ids [B, T] int64.
        attention_mask [B, T]: 0 on padding, at either side.
        labels [B, T] int64: -100 where not a target; default: input_ids wherever attention_mask is 1.
        generator: source of the thoughts, default torch's own; in the same state in all processes of
            torch.distributed (`qstar.distributed_random`).
        position_ids [B, T] int64: only for packed documents; each counts from 0.
        num_items_in_batch: size of the whole batch that this is a part of, accumulated or of several
            processes. Either its number of targets (this loss is weighted by its share of them), or the sum
            of `count_items` over the parts (the losses of the parts then add up to that of the whole).
        thoughts [B, P, R, k] int64: take these, sample none.
        think_mask [B, T]: think after the tokens where it is not 0 and a target follows, whatever the
            config's thinking_positions say.

        Raises ValueError for a text that is too short, or with its thoughts too long for the model's
        context, and for a think_mask that leaves no position to think at.
        """
        self._check(input_ids)
        if self.writer is not None and torch.is_grad_enabled():  # a model may learn in evaluation mode too
            self.writer.keep(p for p in self.parameters() if p.requires_grad)
        rows = TextRows.from_batch(input_ids, attention_mask, position_ids)
        return training_step(
            self.thinker,
            input_ids,
            rows,
            rows.labels(input_ids, labels),
            generator=generator,
            num_items_in_batch=num_items_in_batch,
            thoughts=thoughts,
            think_mask=think_mask,
        )

    def count_items(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        think_mask: Tensor | None = None,
    ) -> Tensor:
        """Count what a batch's loss is a mean over, [m + 2] int64: targets, targets of each talk step,
        rewarded positions (if all positions think, or those of think_mask). Arguments as of `forward`."""
        rows = TextRows.from_batch(input_ids, attention_mask, position_ids)
        return rows.items(rows.labels(input_ids, labels), self.quiet_star.talk_length, think_mask)

    def check_length(
        self, tokens: int, name: str = "input_ids", config: QuietStarConfig | None = None
    ) -> None:
        """Raise ValueError, naming `name`, for a text that exceeds the model's context with its thoughts."""
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
        check_reentrant_checkpointing(self.base)
