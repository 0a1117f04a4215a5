"""Keys and values kept between passes: those of the text, and those of the slots written so far.

Layouts are the operator's: [B, T, Hkv, D] for a text, [B, N, L, Hkv, D] for blocks of slots.
"""

from __future__ import annotations

from torch import Tensor

TextKeysValues = tuple[tuple[Tensor, Tensor], ...]  # (k, v) of each layer, [B, T, Hkv, D]


class SlotCache:
    """K/V of the slots of all blocks, layer by layer, in buffers of full length (no gradient)."""

    def __init__(self, slots: int):
        self.slots = slots
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, first: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [B, N, Lq, Hkv, D] at slots [first, first + Lq); returns those of slots [0, first +
        Lq)."""
        if layer not in self._buffers:
            B, N, _, H, _ = k.shape
            shape = (B, N, self.slots, H)
            self._buffers[layer] = (k.new_empty(*shape, k.shape[-1]), v.new_empty(*shape, v.shape[-1]))
        end = first + k.shape[2]
        written = []
        for buffer, new in zip(self._buffers[layer], (k, v)):
            buffer[:, :, first:end] = new
            written.append(buffer[:, :, :end])
        return written[0], written[1]


class TextCache:
    """K/V of a growing text, in buffers of full length (no gradient): what generation extends token by
    token."""

    def __init__(self, text: TextKeysValues, length: int):
        self.tokens = text[0][0].shape[1]
        self._buffers = []
        for k, v in text:
            pair = tuple(x.new_empty(x.shape[0], length, *x.shape[2:]) for x in (k, v))
            for buffer, given in zip(pair, (k, v)):
                buffer[:, : self.tokens] = given
            self._buffers.append(pair)

    def read(self) -> TextKeysValues:
        return tuple((k[:, : self.tokens], v[:, : self.tokens]) for k, v in self._buffers)

    def append(self, slots: SlotCache) -> None:
        """Take over the last-written token of every row: slot 0 of a cache of one block with one slot."""
        for layer, (k, v) in enumerate(self._buffers):
            new_k, new_v = slots._buffers[layer]
            k[:, self.tokens] = new_k[:, 0, 0]
            v[:, self.tokens] = new_v[:, 0, 0]
        self.tokens += 1
