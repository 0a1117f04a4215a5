"""Thought attention on a CPU: tiles of neighbouring blocks share their prefix keys, so the products are
large.

No dense mask: memory is O(T + N * L) beside a workspace of bounded size. The backward recomputes each tile's
probabilities from the saved global log-sum-exp, P = exp(s - lse), and uses the global delta = rowsum(dO * O)
- dlse: then prefix and own part are back-propagated each alone, exactly. Legend: B rows, N blocks, Lq
queries, Lk own keys, T prefix keys, H key-value heads, G query heads of each, D width; W = Lq * G rows of a
block that see the same prefix keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

WORKSPACE_BYTES = 8 << 20  # of one tile's scores: about what stays in the caches
TILE_ROWS = 1024


def tile_blocks(B: int, H: int, W: int, T: int, Lk: int, itemsize: int) -> int:
    """Blocks of a tile: enough rows for a good matrix product, scores within the workspace, at least one
    block."""
    by_memory = WORKSPACE_BYTES // max(1, B * H * W * (T + Lk) * itemsize)
    return max(1, min(by_memory, TILE_ROWS // W))


@dataclass(frozen=True)
class _Options:
    scale: float
    softcap: float | None
    window: int | None
    own: str


class _Problem:
    """The operands by key-value head, in the dtype that is computed in: q [B, H, N, W, D], prefix [B, H, T,
    D], own k, v [B, H, N, Lk, D]. Queries are scaled already."""

    def __init__(self, q, k, v, k_prefix, v_prefix, prefix_end, prefix_start, options: _Options):
        self.shape = q.shape
        B, N, self.Lq, Hq, _ = q.shape
        H = k.shape[3]
        self.G, self.Lk, self.options = Hq // H, k.shape[2], options
        high = torch.promote_types(q.dtype, torch.float32)
        self.q = self.by_head(q, high).mul_(options.scale)
        self.k, self.v = (x.to(high).permute(0, 3, 1, 2, 4).contiguous() for x in (k, v))
        self.k_prefix, self.v_prefix = (x.to(high).transpose(1, 2).contiguous() for x in (k_prefix, v_prefix))
        slot = torch.arange(self.Lk - self.Lq, self.Lk)
        upper = prefix_end.long()[..., None].expand(B, N, self.Lq)
        lower = prefix_start.long()[..., None].expand(B, N, self.Lq)
        if options.window is not None:
            lower = torch.maximum(lower, upper + slot - options.window + 1)
        self.lower, self.upper = lower, upper
        # a block's window may have moved past its prefix: then it has no prefix key, and lower > upper is
        # harmless
        key = torch.arange(self.Lk)
        hidden = (
            key > slot[:, None]
            if options.own == "causal"
            else torch.zeros(self.Lq, self.Lk, dtype=torch.bool)
        )
        if options.window is not None:
            hidden = hidden | (slot[:, None] - key >= options.window)
        self.own_hidden = hidden.repeat_interleave(self.G, dim=0) if bool(hidden.any()) else None  # [W, Lk]

    def by_head(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, N, Lq, Hq, D] -> [B, H, N, Lq * G, D], a new tensor."""
        B, N, Lq, Hq, D = x.shape
        grouped = x.unflatten(3, (Hq // self.G, self.G)).permute(0, 3, 1, 2, 4, 5)
        out = torch.empty(B, Hq // self.G, N, Lq, self.G, D, dtype=dtype)
        return out.copy_(grouped).flatten(3, 4)

    def by_query(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, H, N, Lq * G, D] -> [B, N, Lq, Hq, D]."""
        return x.unflatten(3, (self.Lq, self.G)).permute(0, 2, 3, 1, 4, 5).flatten(3, 4).to(dtype)

    def tiles(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """(blocks, prefix keys, scores [B, H, n * W, keys + Lk]) of each tile, masked, the prefix keys
        first."""
        B, H, N, W, D = self.q.shape
        T, Lk = self.k_prefix.shape[2], self.Lk
        size = tile_blocks(B, H, W, T, Lk, self.q.element_size())
        buffer = self.q.new_empty(B * H * min(size, N) * W * (T + Lk))
        for first in range(0, N, size):
            blocks = slice(first, min(first + size, N))
            n = blocks.stop - first
            lower, upper = self.lower[:, blocks], self.upper[:, blocks]
            low, high = int(lower.min()), int(upper.max())
            keys = slice(min(low, high), high)
            width = high - keys.start
            scores = buffer[: B * H * n * W * (width + Lk)].view(B * H, n * W, width + Lk)
            q = self.q[:, :, blocks].reshape(B * H, n * W, D).contiguous()
            if width:
                k = self.k_prefix[:, :, keys].reshape(B * H, width, D)
                torch.bmm(q, k.transpose(1, 2), out=scores[..., :width])
            own = scores.view(B * H * n, W, width + Lk)[..., width:]
            k = self.k[:, :, blocks].reshape(B * H * n, Lk, D)
            torch.bmm(q.view(B * H * n, W, D), k.transpose(1, 2), out=own)
            if self.options.softcap is not None:
                scores.div_(self.options.softcap).tanh_().mul_(self.options.softcap)
            if self.own_hidden is not None:
                own.masked_fill_(self.own_hidden, -torch.inf)
            self._mask(scores.view(B, H, n, self.Lq, self.G, width + Lk), keys, lower, upper)
            yield blocks, keys, scores

    @staticmethod
    def _mask(scores: Tensor, keys: slice, lower: Tensor, upper: Tensor) -> None:
        """Hide prefix keys outside [lower, upper), only in the columns where the tile's blocks differ."""
        for first, last, beyond in (
            (keys.start, min(int(lower.max()), keys.stop), lambda key: key < lower[..., None]),
            (max(int(upper.min()), keys.start), keys.stop, lambda key: key >= upper[..., None]),
        ):
            if first < last:
                hidden = beyond(torch.arange(first, last))  # [B, n, Lq, columns]
                columns = scores[..., first - keys.start : last - keys.start]
                columns.masked_fill_(hidden[:, None, :, :, None], -torch.inf)


class _ThoughtAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, k_prefix, v_prefix, sinks, prefix_end, prefix_start, options):
        problem = _Problem(q, k, v, k_prefix, v_prefix, prefix_end, prefix_start, options)
        B, H, N, W, D = problem.q.shape
        out = torch.empty_like(problem.q)
        lse = problem.q.new_empty(B, H, N, W)
        sink = None if sinks is None else _sink_rows(sinks, problem, N)
        for blocks, keys, scores in problem.tiles():
            width = keys.stop - keys.start
            top = scores.amax(dim=-1, keepdim=True)
            total = scores.sub_(top).exp_().sum(dim=-1, keepdim=True)
            row_lse = (total.log() + top).view(B, H, -1, W)
            row_out = _values(problem, blocks, keys, scores, width).div_(total).view(B, H, -1, W, D)
            if sink is not None:
                with_sink = torch.logaddexp(row_lse, sink[:, :, blocks])
                row_out.mul_((row_lse - with_sink).exp_()[..., None])
                row_lse = with_sink
            out[:, :, blocks], lse[:, :, blocks] = row_out, row_lse
        result = problem.by_query(out, q.dtype)
        result_lse = problem.by_query(lse[..., None], lse.dtype).squeeze(-1)
        ctx.save_for_backward(
            q, k, v, k_prefix, v_prefix, sinks, prefix_end, prefix_start, result, result_lse
        )
        ctx.options = options
        ctx.set_materialize_grads(False)
        return result, result_lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_result, d_lse):
        q, k, v, k_prefix, v_prefix, sinks, prefix_end, prefix_start, result, lse = ctx.saved_tensors
        problem = _Problem(q, k, v, k_prefix, v_prefix, prefix_end, prefix_start, ctx.options)
        high = problem.q.dtype
        if d_result is None:
            d_result = torch.zeros_like(result)
        delta = (d_result.to(high) * result.to(high)).sum(-1)
        if d_lse is not None:
            delta = delta - d_lse
        B, H, _, W, D = problem.q.shape
        d_out = problem.by_head(d_result, high)
        row_lse, row_delta = (problem.by_head(x[..., None], high).squeeze(-1) for x in (lse, delta))
        dq, dk, dv = (torch.empty_like(x) for x in (problem.q, problem.k, problem.v))
        dk_prefix, dv_prefix = (torch.zeros_like(x) for x in (problem.k_prefix, problem.v_prefix))
        softcap = ctx.options.softcap
        for blocks, keys, scores in problem.tiles():
            n, width = blocks.stop - blocks.start, keys.stop - keys.start

            def rows(x, blocks=blocks):
                return x[:, :, blocks].reshape(B * H, -1, x.shape[-1]).contiguous()

            tile_q, tile_d_out = rows(problem.q), rows(d_out)
            slope = None if softcap is None else 1 - (scores / softcap).clamp(-1, 1) ** 2
            p = scores.sub_(row_lse[:, :, blocks].reshape(B * H, n * W, 1)).exp_()
            own_p = p.view(B * H * n, W, -1)[..., width:]
            own_d_out, own_q = tile_d_out.view(B * H * n, W, D), tile_q.view(B * H * n, W, D)
            dv[:, :, blocks] = torch.bmm(own_p.transpose(1, 2), own_d_out).view(B, H, n, -1, D)
            dp = torch.empty_like(p)
            own_dp = dp.view(B * H * n, W, -1)[..., width:]
            own_v, own_k = (rows(x).view(B * H * n, -1, D) for x in (problem.v, problem.k))
            torch.bmm(own_d_out, own_v.transpose(1, 2), out=own_dp)
            if width:
                k_keys, v_keys = (
                    x[:, :, keys].reshape(B * H, width, D) for x in (problem.k_prefix, problem.v_prefix)
                )
                dv_prefix[:, :, keys] += torch.bmm(p[..., :width].transpose(1, 2), tile_d_out).view(
                    B, H, width, D
                )
                torch.bmm(tile_d_out, v_keys.transpose(1, 2), out=dp[..., :width])
            ds = dp.sub_(row_delta[:, :, blocks].reshape(B * H, n * W, 1)).mul_(p)
            if slope is not None:
                ds.mul_(slope)
            own_ds = ds.view(B * H * n, W, -1)[..., width:]
            tile_dq = torch.bmm(own_ds, own_k).view(B * H, n * W, D)
            dk[:, :, blocks] = torch.bmm(own_ds.transpose(1, 2), own_q).view(B, H, n, -1, D)
            if width:
                tile_dq.baddbmm_(ds[..., :width], k_keys)
                dk_prefix[:, :, keys] += torch.bmm(ds[..., :width].transpose(1, 2), tile_q).view(
                    B, H, width, D
                )
            dq[:, :, blocks] = tile_dq.view(B, H, n, W, D)
        d_sinks = None
        if sinks is not None:
            d_sinks = -((sinks.to(high) - lse).exp() * delta).sum((0, 1, 2)).to(sinks.dtype)
        return (
            problem.by_query(dq.mul_(ctx.options.scale), q.dtype),
            *(x.permute(0, 2, 3, 1, 4).to(like.dtype) for x, like in ((dk, k), (dv, v))),
            *(x.transpose(1, 2).to(like.dtype) for x, like in ((dk_prefix, k_prefix), (dv_prefix, v_prefix))),
            d_sinks,
            None,
            None,
            None,
        )


def _sink_rows(sinks: Tensor, problem: _Problem, N: int) -> Tensor:
    """sinks [Hq] -> [1, H, N, W], one for each row of a block."""
    by_head = sinks.to(problem.q.dtype).view(1, -1, 1, 1, problem.G)
    return by_head.expand(-1, -1, N, problem.Lq, -1).flatten(3, 4)


def _values(problem: _Problem, blocks: slice, keys: slice, p: Tensor, width: int) -> Tensor:
    """p [B * H, n * W, width + Lk] times the prefix and own values -> [B * H, n * W, D]."""
    B, H, _, W, D = problem.q.shape
    n = blocks.stop - blocks.start
    own_v = problem.v[:, :, blocks].reshape(B * H * n, -1, D)
    out = torch.bmm(p.view(B * H * n, W, -1)[..., width:], own_v).view(B * H, n * W, D)
    if width:
        out.baddbmm_(p[..., :width], problem.v_prefix[:, :, keys].reshape(B * H, width, D))
    return out


def cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    prefix_end: Tensor,
    prefix_start: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: Tensor | None,
    own: str,
) -> tuple[Tensor, Tensor]:
    """See `thought_attention`; computes in fp32 (fp64 for fp64) whatever the dtype of its inputs."""
    with torch.autocast("cpu", enabled=False):
        return _ThoughtAttention.apply(
            q,
            k,
            v,
            k_prefix,
            v_prefix,
            sinks,
            prefix_end,
            prefix_start,
            _Options(scale, softcap, window, own),
        )
