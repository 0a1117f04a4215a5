"""Thought attention on a CPU: tiles of neighbouring blocks share their prefix keys, so the products are
large.

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

from qstar_kernels import cpu_native
from qstar_kernels.checks import check_ranges

WORKSPACE_BYTES = 4 << 20  # of one tile's scores
TILE_QUERIES = 1024  # of a tile, by key-value head: large matrix products, and few of them
TILE_BLOCKS = (
    96  # a tile scores every key that any of its blocks sees: too many blocks undo the causal saving
)


def tile_sizes(B: int, N: int, H: int, W: int, C: int, itemsize: int) -> tuple[int, int]:
    """(rows, blocks) of a tile with C columns: as many blocks as the three limits allow, at least one; and
    several rows when each fits whole."""
    fit = WORKSPACE_BYTES // max(1, H * W * C * itemsize)
    fit = max(1, min(fit, TILE_QUERIES // W, TILE_BLOCKS))
    return (1, fit) if fit < N else (max(1, min(B, fit // max(1, N))), N)


@dataclass(frozen=True)
class Options:
    """See `thought_attention`."""

    scale: float
    softcap: float | None
    window: int | None
    own: str


@dataclass(frozen=True)
class _Tile:
    """rows and blocks of the operands, and the prefix keys that any of these blocks sees."""

    rows: slice
    blocks: slice
    keys: slice

    @property
    def width(self) -> int:
        return self.keys.stop - self.keys.start


class _Problem:
    """The operands in the dtype that is computed in; all but the prefix are gathered tile by tile."""

    def __init__(self, q, k, v, k_prefix, v_prefix, sinks, prefix_end, prefix_start, options: Options):
        self.q, self.k, self.v, self.options = q, k, v, options
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.B, self.N, self.Lq, Hq, self.D = q.shape
        self.T, self.Lk, self.H = k_prefix.shape[1], k.shape[2], k.shape[3]
        self.G = Hq // self.H
        self.W = self.Lq * self.G
        # [H, B, T, D]
        self.k_prefix, self.v_prefix = (
            x.to(self.dtype).permute(2, 0, 1, 3).contiguous() for x in (k_prefix, v_prefix)
        )
        self.sinks = None if sinks is None else sinks.to(self.dtype).view(self.H, 1, 1, 1, self.G)
        slot = torch.arange(self.Lk - self.Lq, self.Lk)
        if prefix_start is None:
            prefix_start = torch.zeros_like(prefix_end)
        # the prefix keys of a query are [lower, upper): [B, N, Lq or 1]
        self.lower, self.upper = prefix_start.long()[..., None], prefix_end.long()[..., None]
        if options.window is not None:
            # a window that has moved past the prefix leaves lower > upper: no prefix key, as it should be
            self.lower = torch.maximum(self.lower, self.upper + slot - options.window + 1)
        key = torch.arange(self.Lk)
        hidden = (key > slot[:, None]) & (options.own == "causal")
        if options.window is not None:
            hidden = hidden | (slot[:, None] - key >= options.window)
        self.own_bias = _bias(hidden, self.dtype)  # [Lq, Lk]
        self.low, self.high = self.lower.tolist(), self.upper.squeeze(-1).tolist()
        self.columns = self.T + self.Lk + (self.sinks is not None)
        self.tile_rows, self.tile_blocks = tile_sizes(
            self.B, self.N, self.H, self.W, self.columns, self.dtype.itemsize
        )
        self.rooms: dict[str, Tensor] = {}
        self.edge: tuple[object, Tensor] = None, self.own_bias

    def tiles(self) -> Iterator[_Tile]:
        if not self.q.numel():
            return
        for i in range(0, self.B, self.tile_rows):
            for j in range(0, self.N, self.tile_blocks):
                rows, blocks = (
                    slice(i, min(i + self.tile_rows, self.B)),
                    slice(j, min(j + self.tile_blocks, self.N)),
                )
                first = min(min(map(min, row[blocks])) for row in self.low[rows])
                last = max(max(row[blocks]) for row in self.high[rows])
                yield _Tile(rows, blocks, slice(min(first, last), last))

    def room(self, name: str, *shape: int, most: int = 0) -> Tensor:
        """Uninitialised, the same memory for every tile: fresh memory costs more than writing to it.

        The first tile has as many rows and blocks as any; `most` elements are for what grows with the keys.
        """
        size = math.prod(shape)
        if name not in self.rooms:
            self.rooms[name] = torch.empty(max(size, most), dtype=self.dtype)
        return self.rooms[name][:size].view(shape)

    def by_head(self, x: Tensor) -> Tensor:
        """A view [B, N, L, H * g, D] -> [H, B, N, L, g, D]."""
        return x.unflatten(3, (self.H, -1)).permute(3, 0, 1, 2, 4, 5)

    def gather(self, name: str, x: Tensor, tile: _Tile) -> Tensor:
        """x `by_head` -> the tile's [H, b, n, L, g, D], contiguous, in high precision."""
        part = x[:, tile.rows, tile.blocks]
        return self.room(name, *part.shape).copy_(part)

    def prefix(self, x: Tensor, tile: _Tile) -> Tensor:
        """[H, B, T, D] -> the tile's keys [H * b, width, D], a view for one row or all."""
        return x[:, tile.rows, tile.keys].flatten(0, 1)

    def scores(self, tile: _Tile, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
        """Masked scores [H * b, n * W, C]; and the slope of the soft-cap alike, where there is one.

        q [H, b, n, Lq, G, D] is scaled already; k [H, b, n, Lk, 1, D].
        """
        scores = self.products("scores", tile, q, k, self.k_prefix)
        slope = None
        if self.options.softcap is not None:
            scores.div_(self.options.softcap).tanh_()
            slope = 1 - scores * scores
            scores.mul_(self.options.softcap)
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
        """What hides the last prefix keys and the own slots, [b, n, Lq, 1, columns]; and its first column."""
        ends = [row[tile.blocks] for row in self.high[tile.rows]]
        edge = min(max(min(map(min, ends)), tile.keys.start), tile.keys.stop)
        pattern = [[end - edge for end in row] for row in ends], tile.keys.stop - edge
        if self.edge[0] != pattern:  # of regular positions, all tiles have one
            key = torch.arange(edge, tile.keys.stop)
            upper = self.upper[tile.rows, tile.blocks]
            prefix = _bias(key >= upper[..., None], self.dtype).expand(-1, -1, self.Lq, -1)
            own = self.own_bias.expand(*upper.shape[:2], -1, -1)
            self.edge = pattern, torch.cat([prefix, own], dim=-1)[:, :, :, None]
        return self.edge[1], edge - tile.keys.start

    def products(self, name: str, tile: _Tile, x: Tensor, own: Tensor, prefix: Tensor) -> Tensor:
        """x [H, b, n, Lq, G, D] times the keys (or values) of prefix and own slots: [H * b, n * W, C]."""
        H, b, n = x.shape[:3]
        C = tile.width + self.Lk + (self.sinks is not None)
        most = self.tile_rows * self.tile_blocks * H * self.W * self.columns
        result = self.room(name, H * b, n * self.W, C, most=most)
        if tile.width:
            keys = self.prefix(prefix, tile).transpose(1, 2)
            torch.bmm(x.view(H * b, n * self.W, self.D), keys, out=result[..., : tile.width])
        # a batched product wants contiguous memory to write to, or it becomes a loop over the batch
        own_result = self.room("own", H * b * n, self.W, self.Lk)
        keys = own.view(-1, self.Lk, self.D).transpose(1, 2)
        self.own_columns(tile, result).copy_(torch.bmm(x.view(-1, self.W, self.D), keys, out=own_result))
        return result

    def own_columns(self, tile: _Tile, scores: Tensor) -> Tensor:
        """[H * b, n * W, C] -> the columns of the own slots, [H * b * n, W, Lk]."""
        return scores.view(-1, self.W, scores.shape[-1])[..., tile.width : tile.width + self.Lk]

    def weighted(self, tile: _Tile, p: Tensor, own: Tensor, prefix: Tensor) -> Tensor:
        """p [H * b, n * W, C] times the values (or keys) of prefix and own slots: [H, b, n, Lq, G, D]."""
        H, b, n = own.shape[:3]
        result = self.room("weighted", H * b * n, self.W, self.D)
        torch.bmm(self.own_columns(tile, p), own.view(-1, self.Lk, self.D), out=result)
        if tile.width:
            rows = result.view(H * b, n * self.W, self.D)
            rows.baddbmm_(p[..., : tile.width], self.prefix(prefix, tile))
        return result.view(H, b, n, self.Lq, self.G, self.D)

    def accumulate(self, tile: _Tile, p: Tensor, x: Tensor, own: Tensor, prefix: Tensor) -> None:
        """p [H * b, n * W, C] transposed times x [H, b, n, Lq, G, D], put into own (`by_head`) and added to
        prefix [H, B, T, D]."""
        H, b, n = x.shape[:3]
        result = self.room("accumulated", H * b * n, self.Lk, self.D)
        torch.bmm(self.own_columns(tile, p).transpose(1, 2), x.view(-1, self.W, self.D), out=result)
        own[:, tile.rows, tile.blocks] = result.view(H, b, n, self.Lk, 1, self.D)
        if tile.width:
            by_key = p[..., : tile.width].transpose(1, 2)
            rows = x.view(H * b, n * self.W, self.D)
            # summed apart and then added: products that go on from large sums lose digits
            sums = self.room("sums", H, tile.width, self.D, most=H * self.T * self.D)
            for i, row in enumerate(range(tile.rows.start, tile.rows.stop)):
                prefix[:, row, tile.keys] += torch.bmm(by_key[i::b], rows[i::b], out=sums)


def _bias(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    prefix_end: Tensor,
    prefix_start: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    own: str,
) -> tuple[Tensor, Tensor]:
    """out and lse of the operator: by the C kernel where it is built and takes the operands, or in tiles.

    Raises ValueError for a range outside of the prefix.
    """
    if cpu_native.can(q, k):
        found = cpu_native.forward(
            q, k, v, k_prefix, v_prefix, prefix_end, prefix_start, sinks, scale, softcap, window, own
        )
        if found is not None:
            return found
    check_ranges(prefix_end, prefix_start, k_prefix.shape[1])
    with torch.autocast("cpu", enabled=False):
        options = Options(scale, softcap, window, own)
        return _in_tiles(q, k, v, k_prefix, v_prefix, prefix_end, prefix_start, sinks, options)


def _in_tiles(
    q, k, v, k_prefix, v_prefix, prefix_end, prefix_start, sinks, options: Options
) -> tuple[Tensor, Tensor]:
    problem = _Problem(q, k, v, k_prefix, v_prefix, sinks, prefix_end, prefix_start, options)
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(*q.shape[:-1], 1, dtype=problem.dtype)
    q, k, v, out_by_head, lse_by_head = map(problem.by_head, (q, k, v, out, lse))
    for tile in problem.tiles():
        tile_q = problem.gather("q", q, tile).mul_(options.scale)
        scores, _ = problem.scores(tile, tile_q, problem.gather("own k", k, tile))
        top = scores.amax(dim=-1)
        p = torch.softmax(scores, dim=-1, out=scores)
        # the largest probability is exp(top - lse)
        tile_lse = top.sub_(p.amax(dim=-1).log_()).view(*tile_q.shape[:-1], 1)
        lse_by_head[:, tile.rows, tile.blocks] = tile_lse
        tile_out = problem.weighted(tile, p, problem.gather("own v", v, tile), problem.v_prefix)
        out_by_head[:, tile.rows, tile.blocks] = tile_out
    return out, lse.squeeze(-1)


def backward(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    prefix_end: Tensor,
    prefix_start: Tensor | None,
    sinks: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv, dk_prefix, dv_prefix, dsinks."""
    problem = _Problem(q, k, v, k_prefix, v_prefix, sinks, prefix_end, prefix_start, options)
    d_lse = problem.by_head(d_lse[..., None])
    gradients = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)]
    q, k, v, d_out, dq, dk, dv = map(problem.by_head, (q, k, v, d_out, *gradients))
    dk_prefix, dv_prefix = (torch.zeros_like(x) for x in (problem.k_prefix, problem.v_prefix))
    d_sinks = None if problem.sinks is None else torch.zeros(problem.H, problem.G, dtype=problem.dtype)
    for tile in problem.tiles():
        tile_q = problem.gather("q", q, tile).mul_(options.scale)
        tile_d_out = problem.gather("d_out", d_out, tile)
        tile_k, tile_v = problem.gather("own k", k, tile), problem.gather("own v", v, tile)
        scores, slope = problem.scores(tile, tile_q, tile_k)
        p = torch.softmax(scores, dim=-1, out=scores)
        problem.accumulate(tile, p, tile_d_out, dv, dv_prefix)
        dp = problem.products("dp", tile, tile_d_out, tile_v, problem.v_prefix)
        if d_sinks is not None:
            dp[..., -1] = 0  # a sink has no value
        ds = dp.mul_(p)
        delta = ds.sum(dim=-1, keepdim=True)
        delta -= problem.gather("d_lse", d_lse, tile).view(delta.shape)
        ds.addcmul_(p, delta, value=-1)
        if d_sinks is not None:
            d_sinks += ds[..., -1].reshape(*tile_q.shape[:-1]).sum((1, 2, 3))
        if slope is not None:
            ds.mul_(slope)
        tile_dq = problem.weighted(tile, ds, tile_k, problem.k_prefix)
        dq[:, tile.rows, tile.blocks] = tile_dq.mul_(options.scale)
        problem.accumulate(tile, ds, tile_q, dk, dk_prefix)
    dq, dk, dv = gradients
    dk_prefix, dv_prefix = (
        x.permute(1, 2, 0, 3).to(q.dtype, copy=True, memory_format=torch.contiguous_format)
        for x in (dk_prefix, dv_prefix)
    )
    return dq, dk, dv, dk_prefix, dv_prefix, None if d_sinks is None else d_sinks.flatten().to(q.dtype)
