"""Think: read a text, write thoughts after its tokens, read the thoughts.

The training step and the generator both stand on this file; it knows neither. Legend: B rows, T tokens in a
row, P thinking positions in a row, R thoughts per position, N = P * R blocks, k thought tokens, m talk
tokens, L = k + m + 1 slots in a block, D width.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from qstar_kernels.vocabulary import LinearHead
from torch import Tensor, nn
from transformers import PreTrainedModel

from qstar.attention_interface import BlockPass
from qstar.base_model import linear_head, read_slots, read_text
from qstar.boundary import BoundaryEmbeddings
from qstar.config import QuietStarConfig
from qstar.frozen_writer import FrozenWriter
from qstar.kv_cache import SlotCache, TextKeysValues
from qstar.layout import TextRows, ThoughtLayout
from qstar.mixing import MixingHead
from qstar.profiler_ranges import BLOCKS, LOSS, PREFIX, ROLLOUT, phase
from qstar.rollout import SlotReader, rollout


@dataclass(frozen=True)
class Thoughts:
    """Thoughts that have been read, at the positions of `layout`.

    tokens [B, P, R, k] int64; slot_hidden [B, P, R, L, D], all slots after the final norm; talk_hidden
    [B, P, R, m, D], its last m; base_hidden [B, P, 1, m, D] of x_{t+j}; mix_weight [B, P, R, m] fp32.
    """

    layout: ThoughtLayout
    tokens: Tensor
    slot_hidden: Tensor
    talk_hidden: Tensor
    base_hidden: Tensor
    mix_weight: Tensor


@dataclass(frozen=True)
class Thinker:
    """The parts of a model that think, without the face that transformers sees.

    `writer` None: the base model writes its own thoughts; suppress [S] int64: ids that never occur inside a
    thought. Another config for the same parts: `dataclasses.replace(thinker, config=...)`.
    """

    base: PreTrainedModel
    boundary: BoundaryEmbeddings
    mixing: MixingHead
    writer: FrozenWriter | None
    suppress: Tensor
    config: QuietStarConfig

    @property
    def author(self) -> tuple[PreTrainedModel, BoundaryEmbeddings]:
        """The base model and the boundary embeddings that write the thoughts."""
        part = self if self.writer is None else self.writer
        return part.base, part.boundary

    def modules(self) -> Iterator[nn.Module]:
        """Iterate over the modules that a step runs with gradient."""
        for part in (self.base, self.mixing, self.boundary):
            yield from part.modules()

    def linear_head(self) -> LinearHead:
        """Return the base model's map from hidden states to logits; see `base_model.linear_head`."""
        return linear_head(self.base)

    def read_text(self, input_ids: Tensor, rows: TextRows) -> tuple[Tensor, TextKeysValues]:
        """Read the text [B, T] with gradient; see `base_model.read_text`."""
        with phase(PREFIX):
            return read_text(self.base, input_ids, rows)

    @torch.no_grad()
    def authors_text(self, input_ids: Tensor, rows: TextRows, text: TextKeysValues) -> TextKeysValues:
        """Return the K/V of the text as the author of the thoughts reads it: `text`, the model's own,
        detached; a frozen writer reads it anew."""
        if self.writer is None:
            return tuple((k.detach(), v.detach()) for k, v in text)
        with phase(ROLLOUT):
            return read_text(self.writer.base, input_ids, rows)[1]

    def sample_thoughts(
        self,
        text: TextKeysValues,
        layout: ThoughtLayout,
        generator: torch.Generator | None = None,
        uniform: Tensor | None = None,
    ) -> Tensor:
        """Sample thoughts [B, P, R, k] int64 at the layout's positions, without gradient.

        text from `authors_text`; `generator` draws them, or the numbers uniform [k, B, P * R] fp64 in [0, 1).
        """
        whole = BlockPass(text, layout.prefix_start, layout.prefix_end, impl=self.config.attention)

        def read(embeddings: Tensor, first: int, cache: SlotCache) -> Tensor:
            step = replace(whole, slots=cache, first=first)
            return read_slots(self.author[0], embeddings, layout.slot_position_ids[:, :, first], step)

        B, N = layout.prefix_end.shape
        cache = SlotCache(self.config.thought_length)
        with phase(ROLLOUT):
            found = self.rollout(read, (B, N), cache, generator, uniform)
        return found.view(*layout.positions.shape, layout.num_thoughts, -1)

    def rollout(
        self,
        read: SlotReader,
        blocks: tuple[int, int],
        cache: SlotCache,
        generator: torch.Generator | None = None,
        uniform: Tensor | None = None,
    ) -> Tensor:
        """Sample one thought a block, [B, N, k] int64; read: the author's pass over one slot of every block;
        see `rollout.rollout`."""
        base, boundary = self.author
        return rollout(
            read_slots=read,
            embed=base.get_input_embeddings(),
            boundary=boundary,
            head=linear_head(base),
            blocks=blocks,
            thought_length=self.config.thought_length,
            cache=cache,
            temperature=self.config.thought_temperature,
            suppress=self.suppress,
            generator=generator,
            uniform=uniform,
        )

    def slots(self, thoughts: Tensor, talk: Tensor) -> Tensor:
        """Assemble the embeddings [B, N, L, D] of `<start> thought <end> talk`, of thoughts [B, N, k] and the
        talk tokens that are fed [B, N, m - 1], both int64."""
        B, N, k = thoughts.shape
        tokens = self.base.get_input_embeddings()(torch.cat([thoughts, talk], dim=-1))
        start, end = (
            x.to(tokens.dtype).expand(B, N, 1, -1) for x in (self.boundary.start, self.boundary.end)
        )
        return torch.cat([start, tokens[:, :, :k], end, tokens[:, :, k:]], dim=2)

    def read_thoughts(
        self,
        input_ids: Tensor,
        text_hidden: Tensor,
        text: TextKeysValues,
        layout: ThoughtLayout,
        thoughts: Tensor,
    ) -> Thoughts:
        """Read all slots of the thoughts [B, P, R, k] in one pass, with gradient, and weigh them.

        input_ids [B, T], whose talk tokens are fed; text_hidden [B, T, D] and text from `read_text`. Raises
        ValueError for thoughts of another shape.
        """
        k, m, R = self.config.thought_length, self.config.talk_length, layout.num_thoughts
        B, P = layout.positions.shape
        if thoughts.shape != (B, P, R, k):
            raise ValueError(
                f"thoughts has shape {tuple(thoughts.shape)}: must be [B, P, R, k] = {(B, P, R, k)}"
            )
        block_pass = BlockPass(text, layout.prefix_start, layout.prefix_end, impl=self.config.attention)
        with phase(BLOCKS):
            talk = input_ids.gather(1, layout.talk_index[:, :, 1:].reshape(B, -1)).view(B, P, 1, m - 1)
            slots = self.slots(thoughts.flatten(1, 2), talk.expand(B, P, R, m - 1).flatten(1, 2))
            hidden = read_slots(
                self.base, slots.flatten(1, 2), layout.slot_position_ids.flatten(1), block_pass
            )
        hidden = hidden.view(B, P, R, self.config.slots, -1)
        talk_hidden = hidden[..., k + 1 :, :]
        row = torch.arange(B, device=input_ids.device)[:, None, None]
        base_hidden = text_hidden[row, layout.talk_index][:, :, None]
        with phase(LOSS):
            weight = self.mixing(base_hidden.expand(B, P, R, m, -1), talk_hidden)
        return Thoughts(layout, thoughts, hidden, talk_hidden, base_hidden, weight)

    def think(
        self,
        input_ids: Tensor,
        text_hidden: Tensor,
        text: TextKeysValues,
        layout: ThoughtLayout,
        thoughts: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Thoughts:
        """Sample thoughts at the layout's positions, unless they are given, and read them; arguments as of
        `read_thoughts`."""
        if thoughts is None:
            written_on = self.authors_text(input_ids, layout.rows, text)
            thoughts = self.sample_thoughts(written_on, layout, generator)
        return self.read_thoughts(input_ids, text_hidden, text, layout, thoughts)
