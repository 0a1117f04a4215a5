"""The sampling step of regular blocks on a CPU: plain causal attention and a small own part, no tiles.

One query slot of every block, R blocks at each of the tokens 1 .. P, forward only: with the R blocks folded
into the query heads of their group, the prefix part is square causal attention, which torch's own operator
does with its log-sum-exp; so are the own slots, each block a batch of its own. The log-sum-exps merge the two
parts exactly. Legend as in cpu.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


def thoughts_at_each_token(prefix_start: Tensor, prefix_end: Tensor, T: int) -> int | None:
    """R when every row's blocks are R at each of the tokens 1 .. N / R and see all before; else None."""
    N = prefix_end.shape[1]
    if not prefix_end.numel() or bool(prefix_start.any()):
        return None
    R = int((prefix_end[0] == 1).sum())
    if R == 0 or N % R or N // R > T:
        return None
    regular = torch.arange(1, N // R + 1).repeat_interleave(R)
    return R if bool((prefix_end == regular).all()) else None


def sampling_step(
    q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor, v_prefix: Tensor, scale: float, R: int
) -> tuple[Tensor, Tensor]:
    """q [B, N, 1, Hq, D], k, v [B, N, Lk, H, D], prefixes [B, T, H, D] -> (out, lse) of the operator."""
    B, N, _, Hq, D = q.shape
    Lk, H = k.shape[2], k.shape[3]
    G, P = Hq // H, N // R
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    dtype, high = q.dtype, torch.promote_types(q.dtype, torch.float32)
    # that operator would round each part to a low precision before they are merged; and it takes any strides
    # but the last
    q, k, v, k_prefix, v_prefix = (
        x if x.stride(-1) == 1 else x.contiguous()
        for x in (y.to(high) for y in (q, k, v, k_prefix, v_prefix))
    )
    # query heads of the causal call, in the order of their key-value heads: H * (R * G)
    folded = q.reshape(B, P, R, H, G, D).permute(0, 3, 2, 4, 1, 5).reshape(B, Hq * R, P, D)
    prefix = (x[:, :P].transpose(1, 2) for x in (k_prefix, v_prefix))
    prefix_out, prefix_lse = attend(folded, *prefix, is_causal=True, scale=scale)
    # [B, H * (R * G), P, ...] -> [B, P, R, H, G, ...], as the own part is
    prefix_out = prefix_out.view(B, H, R, G, P, D).permute(0, 4, 2, 1, 3, 5)
    prefix_lse = prefix_lse.view(B, H, R, G, P).permute(0, 4, 2, 1, 3)
    # a block is a batch of its own, the query heads of a group are its queries: views, no copies
    own = (x.reshape(B * N, Lk, H, D).transpose(1, 2) for x in (k, v))
    own_out, own_lse = attend(q.reshape(B * N, H, G, D), *own, scale=scale)
    own_out, own_lse = own_out.reshape(B, P, R, H, G, D), own_lse.reshape(B, P, R, H, G)
    share = torch.sigmoid(own_lse - prefix_lse)[..., None]
    out = torch.lerp(prefix_out, own_out, share).to(dtype)
    return out.reshape(q.shape), torch.logaddexp(prefix_lse, own_lse).reshape(q.shape[:-1])
