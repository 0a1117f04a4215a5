"""Keep keys and values between passes: those of the text, and those of the slots written so far.

Layouts are the operator's: [B, T, Hkv, D] for a text, [B, N, L, Hkv, D] for blocks of slots.
"""

import torch
from torch import Tensor

TextKeysValues = tuple[tuple[Tensor, Tensor], ...]  # (k, v) of each layer, [B, T, Hkv, D]


class SlotCache:
    """Hold the K/V of the slots of all blocks, layer by layer, in buffers of full length (no gradient)."""

    def __init__(self, slots: int):
        self.slots = slots
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, first: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [B, N, Lq, Hkv, D] at slots [first, first + Lq); return those of [0, first + Lq)."""
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
    """Hold the K/V of a text that generation extends token by token, in buffers of full length (no gradient).

    Rows may grow unevenly: each token goes to a column of its own row and overwrites what was there, the K/V
    of a draft that was not kept.
    """

    def __init__(self, text: TextKeysValues, length: int):
        self._buffers = []
        for k, v in text:
            pair = tuple(x.new_empty(x.shape[0], length, *x.shape[2:]) for x in (k, v))
            for buffer, given in zip(pair, (k, v)):
                buffer[:, : given.shape[1]] = given
                buffer[:, given.shape[1] :] = 0  # unwritten columns are masked, but must not be NaN
            self._buffers.append(pair)

    def read(self, columns: int) -> TextKeysValues:
        """Return the K/V of the first columns."""
        return tuple((k[:, :columns], v[:, :columns]) for k, v in self._buffers)

    def write(self, slots: SlotCache, column: Tensor) -> None:
        """Write slot 0 of a cache with one block a row to column [B] of each row."""
        row = torch.arange(len(column), device=column.device)
        for layer, buffers in enumerate(self._buffers):
            for buffer, new in zip(buffers, slots._buffers[layer]):
                buffer[row, column] = new[:, 0, 0]
