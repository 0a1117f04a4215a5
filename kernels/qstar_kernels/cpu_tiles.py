"""Thought attention on a CPU by torch's operators: tiles of neighbouring blocks share their prefix keys, so
the products are large.

No dense mask: memory is O(T + N * L) beside a workspace of bounded size, about what stays in the caches. A
tile's scores are [prefix keys | own slots | sink], so one softmax covers all three, and the backward that
makes it again has the global probabilities P and the global delta = rowsum(P * dP) - dlse: prefix and own
part are then back-propagated each alone, exactly. Legend: B rows, N blocks, Lq queries, Lk own keys, T prefix
keys, H key-value heads, G query heads of each, D width; W = Lq * G queries of a block see the same prefix
keys; b, n: rows and blocks of a tile, C columns of its scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qstar_kernels.operands import Operands

WORKSPACE_BYTES = 4 << 20  # of one tile's scores
TILE_QUERIES = 1024  # of a tile, by key-value head: large matrix products, and few of them
TILE_BLOCKS = 96  # a tile scores every key that any block sees: too many undo the causal saving


def tile_sizes(B: int, N: int, H: int, W: int, C: int, itemsize: int) -> tuple[int, int]:
    """Choose (rows, blocks) of a tile with C columns: as many blocks as the three limits allow, at least one;
    several rows where each fits whole."""
    fit = WORKSPACE_BYTES // max(1, H * W * C * itemsize)
    fit = max(1, min(fit, TILE_QUERIES // W, TILE_BLOCKS))
    return (1, fit) if fit < N else (max(1, min(B, fit // max(1, N))), N)


@dataclass(frozen=True)
class _Tile:
    """rows and blocks of the operands, and the prefix keys that any of these blocks sees."""

    rows: slice
    blocks: slice
    keys: slice

    @property
    def width(self) -> int:
        return self.keys.stop - self.keys.start


class _Tiles:
    """The tiles of a problem; the prefix in the dtype computed in, all else gathered tile by tile."""

    def __init__(self, operands: Operands):
        self.dtype = operands.high
        self.B, self.N, self.Lq, Hq, self.D = operands.q.shape
        self.T, self.Lk, self.H = operands.T, operands.Lk, operands.Hkv
        self.G = Hq // self.H
        self.W = self.Lq * self.G
        self.softcap, window = operands.softcap, operands.window
        # [H, B, T, D]
        self.k_prefix, self.v_prefix = (
            x.to(self.dtype).permute(2, 0, 1, 3).contiguous() for x in (operands.k_prefix, operands.v_prefix)
        )
        sinks = operands.sinks
        self.sinks = None if sinks is None else sinks.to(self.dtype).view(self.H, 1, 1, 1, self.G)
        slot = torch.arange(self.Lk - self.Lq, self.Lk)
        prefix_start, prefix_end = operands.prefix_start, operands.prefix_end
        if prefix_start is None:
            prefix_start = torch.zeros_like(prefix_end)
        # the prefix keys of a query are [lower, upper): [B, N, Lq or 1]
        self.lower, self.upper = prefix_start.long()[..., None], prefix_end.long()[..., None]
        if window is not None:
            # a window that has moved past the prefix leaves lower > upper: no prefix key, as it should be
            self.lower = torch.maximum(self.lower, self.upper + slot - window + 1)
        key = torch.arange(self.Lk)
        hidden = (key > slot[:, None]) & (operands.own == "causal")
        if window is not None:
            hidden = hidden | (slot[:, None] - key >= window)
        self.own_bias = _bias(hidden, self.dtype)  # [Lq, Lk]
        self.low, self.high = self.lower.tolist(), self.upper.squeeze(-1).tolist()
        self.columns = self.T + self.Lk + (self.sinks is not None)
        self.tile_rows, self.tile_blocks = tile_sizes(
            self.B, self.N, self.H, self.W, self.columns, self.dtype.itemsize
        )
        self.memory: dict[str, Tensor] = {}
        self.edge: tuple[object, Tensor] = None, self.own_bias

    def __iter__(self) -> Iterator[_Tile]:
        if not self.B * self.N * self.D:
            return
        for i in range(0, self.B, self.tile_rows):
            for j in range(0, self.N, self.tile_blocks):
                rows = slice(i, min(i + self.tile_rows, self.B))
                blocks = slice(j, min(j + self.tile_blocks, self.N))
                first = min(min(map(min, row[blocks])) for row in self.low[rows])
                last = max(max(row[blocks]) for row in self.high[rows])
                yield _Tile(rows, blocks, slice(min(first, last), last))

    def scratch(self, name: str, *shape: int, most: int = 0) -> Tensor:
        """Return memory of that shape, not initialised, the same for every tile: fresh memory costs more than
        writing to it.

        The first tile has as many rows and blocks as any; `most` is the element count of what grows with the
        keys.
        """
        size = math.prod(shape)
        if name not in self.memory:
            self.memory[name] = torch.empty(max(size, most), dtype=self.dtype)
        return self.memory[name][:size].view(shape)

    def by_head(self, x: Tensor) -> Tensor:
        """View [B, N, L, H * g, D] as [H, B, N, L, g, D]."""
        return x.unflatten(3, (self.H, -1)).permute(3, 0, 1, 2, 4, 5)

    def gather(self, name: str, x: Tensor, tile: _Tile) -> Tensor:
        """Copy the tile out of x `by_head`: [H, b, n, L, g, D], contiguous, in high precision."""
        part = x[:, tile.rows, tile.blocks]
        return self.scratch(name, *part.shape).copy_(part)

    def prefix(self, x: Tensor, tile: _Tile) -> Tensor:
        """Take the tile's keys out of [H, B, T, D]: [H * b, width, D], a view for one row or all."""
        return x[:, tile.rows, tile.keys].flatten(0, 1)

    def scores(self, tile: _Tile, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the masked scores [H * b, n * W, C], and the slope of the soft-cap where there is one.

        q [H, b, n, Lq, G, D] is scaled already; k is [H, b, n, Lk, 1, D].
        """
        scores = self.products("scores", tile, q, k, self.k_prefix)
        slope = None
        if self.softcap is not None:
            scores.div_(self.softcap).tanh_()
            slope = 1 - scores * scores
            scores.mul_(self.softcap)
        by_block = scores.view(*q.shape[:-1], -1)
        if self.sinks is not None:
            by_block[..., -1] = self.sinks
        bias, first = self._edge_bias(tile)
        by_block[..., first : first + bias.shape[-1]].add_(bias)
        highest = max(max(map(max, row[tile.blocks])) for row in self.low[tile.rows])
        if highest > tile.keys.start:
            key = torch.arange(tile.keys.start, min(highest, tile.keys.stop))
            bias = _bias(key < self.lower[tile.rows, tile.blocks][..., None], self.dtype)
            by_block[..., : len(key)].add_(bias[:, :, :, None])
        return scores, slope

    def _edge_bias(self, tile: _Tile) -> tuple[Tensor, int]:
        """Return the bias [b, n, Lq, 1, columns] that hides the last prefix keys and own slots, and its first
        column."""
        ends = [row[tile.blocks] for row in self.high[tile.rows]]
        edge = min(max(min(map(min, ends)), tile.keys.start), tile.keys.stop)
        pattern = [[end - edge for end in row] for row in ends], tile.keys.stop - edge
        if self.edge[0] != pattern:  # with regular positions all tiles share one
            key = torch.arange(edge, tile.keys.stop)
            upper = self.upper[tile.rows, tile.blocks]
            prefix = _bias(key >= upper[..., None], self.dtype).expand(-1, -1, self.Lq, -1)
            own = self.own_bias.expand(*upper.shape[:2], -1, -1)
            self.edge = pattern, torch.cat([prefix, own], dim=-1)[:, :, :, None]
        return self.edge[1], edge - tile.keys.start

    def products(self, name: str, tile: _Tile, x: Tensor, own: Tensor, prefix: Tensor) -> Tensor:
        """Multiply x [H, b, n, Lq, G, D] by keys (or values) of prefix and own slots: [H * b, n * W, C]."""
        H, b, n = x.shape[:3]
        C = tile.width + self.Lk + (self.sinks is not None)
        most = self.tile_rows * self.tile_blocks * H * self.W * self.columns
        result = self.scratch(name, H * b, n * self.W, C, most=most)
        if tile.width:
            keys = self.prefix(prefix, tile).transpose(1, 2)
            torch.bmm(x.view(H * b, n * self.W, self.D), keys, out=result[..., : tile.width])
        # a batched product wants contiguous memory to write to, or it becomes a loop over the batch
        own_result = self.scratch("own", H * b * n, self.W, self.Lk)
        keys = own.view(-1, self.Lk, self.D).transpose(1, 2)
        self.own_columns(tile, result).copy_(torch.bmm(x.view(-1, self.W, self.D), keys, out=own_result))
        return result

    def own_columns(self, tile: _Tile, scores: Tensor) -> Tensor:
        """View the columns of the own slots of [H * b, n * W, C]: [H * b * n, W, Lk]."""
        return scores.view(-1, self.W, scores.shape[-1])[..., tile.width : tile.width + self.Lk]

    def weighted(self, tile: _Tile, p: Tensor, own: Tensor, prefix: Tensor) -> Tensor:
        """Multiply p [H * b, n * W, C] by values (or keys) of prefix and own slots: [H, b, n, Lq, G, D]."""
        H, b, n = own.shape[:3]
        result = self.scratch("weighted", H * b * n, self.W, self.D)
        torch.bmm(self.own_columns(tile, p), own.view(-1, self.Lk, self.D), out=result)
        if tile.width:
            rows = result.view(H * b, n * self.W, self.D)
            rows.baddbmm_(p[..., : tile.width], self.prefix(prefix, tile))
        return result.view(H, b, n, self.Lq, self.G, self.D)

    def accumulate(self, tile: _Tile, p: Tensor, x: Tensor, own: Tensor, prefix: Tensor) -> None:
        """Multiply p [H * b, n * W, C] transposed by x [H, b, n, Lq, G, D]; write the own slots to own
        (`by_head`) and add the rest to prefix [H, B, T, D]."""
        H, b, n = x.shape[:3]
        result = self.scratch("accumulated", H * b * n, self.Lk, self.D)
        torch.bmm(self.own_columns(tile, p).transpose(1, 2), x.view(-1, self.W, self.D), out=result)
        own[:, tile.rows, tile.blocks] = result.view(H, b, n, self.Lk, 1, self.D)
        if tile.width:
            by_key = p[..., : tile.width].transpose(1, 2)
            rows = x.view(H * b, n * self.W, self.D)
            # summed apart and then added: products that go on from large sums lose digits
            sums = self.scratch("sums", H, tile.width, self.D, most=H * self.T * self.D)
            for i, row in enumerate(range(tile.rows.start, tile.rows.stop)):
                prefix[:, row, tile.keys] += torch.bmm(by_key[i::b], rows[i::b], out=sums)


def _bias(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)


def forward(operands: Operands) -> tuple[Tensor, Tensor]:
    """Compute out [B, N, Lq, Hq, D] and lse [B, N, Lq, Hq]."""
    tiles = _Tiles(operands)
    out, lse = operands.empty_results()
    q, k, v, out_by_head, lse_by_head = map(
        tiles.by_head, (operands.q, operands.k, operands.v, out, lse[..., None])
    )
    for tile in tiles:
        tile_q = tiles.gather("q", q, tile).mul_(operands.scale)
        scores, _ = tiles.scores(tile, tile_q, tiles.gather("own k", k, tile))
        top = scores.amax(dim=-1)
        p = torch.softmax(scores, dim=-1, out=scores)
        # the largest probability is exp(top - lse)
        tile_lse = top.sub_(p.amax(dim=-1).log_()).view(*tile_q.shape[:-1], 1)
        lse_by_head[:, tile.rows, tile.blocks] = tile_lse
        tile_out = tiles.weighted(tile, p, tiles.gather("own v", v, tile), tiles.v_prefix)
        out_by_head[:, tile.rows, tile.blocks] = tile_out
    return out, lse


def backward(
    d_out: Tensor, d_lse: Tensor, operands: Operands
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Compute dq, dk, dv, dk_prefix, dv_prefix and dsinks (None without sinks)."""
    tiles = _Tiles(operands)
    sinks, d_sinks = operands.sinks, None
    if sinks is not None:
        d_sinks = torch.zeros(tiles.H, tiles.G, dtype=tiles.dtype)
    gradients = [x.new_empty(x.shape) for x in (operands.q, operands.k, operands.v)]
    q, k, v, d_out, d_lse, dq, dk, dv = map(
        tiles.by_head, (operands.q, operands.k, operands.v, d_out, d_lse[..., None], *gradients)
    )
    dk_prefix, dv_prefix = (torch.zeros_like(x) for x in (tiles.k_prefix, tiles.v_prefix))
    for tile in tiles:
        tile_q = tiles.gather("q", q, tile).mul_(operands.scale)
        tile_d_out = tiles.gather("d_out", d_out, tile)
        tile_k, tile_v = tiles.gather("own k", k, tile), tiles.gather("own v", v, tile)
        scores, slope = tiles.scores(tile, tile_q, tile_k)
        p = torch.softmax(scores, dim=-1, out=scores)
        tiles.accumulate(tile, p, tile_d_out, dv, dv_prefix)
        dp = tiles.products("dp", tile, tile_d_out, tile_v, tiles.v_prefix)
        if d_sinks is not None:
            dp[..., -1] = 0  # a sink has no value
        ds = dp.mul_(p)
        delta = ds.sum(dim=-1, keepdim=True)
        delta -= tiles.gather("d_lse", d_lse, tile).view(delta.shape)
        ds.addcmul_(p, delta, value=-1)
        if d_sinks is not None:
            d_sinks += ds[..., -1].reshape(*tile_q.shape[:-1]).sum((1, 2, 3))
        if slope is not None:
            ds.mul_(slope)
        tile_dq = tiles.weighted(tile, ds, tile_k, tiles.k_prefix)
        dq[:, tile.rows, tile.blocks] = tile_dq.mul_(operands.scale)
        tiles.accumulate(tile, ds, tile_q, dk, dk_prefix)
    dk_prefix, dv_prefix = (
        x.permute(1, 2, 0, 3).to(operands.q.dtype, copy=True, memory_format=torch.contiguous_format)
        for x in (dk_prefix, dv_prefix)
    )
    d_sinks = None if sinks is None or d_sinks is None else d_sinks.flatten().to(sinks.dtype)
    d_queries, d_keys, d_values = gradients
    return d_queries, d_keys, d_values, dk_prefix, dv_prefix, d_sinks
