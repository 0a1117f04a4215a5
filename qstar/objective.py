"""Compute losses, rewards and metrics from NLLs and log-probabilities, as pure functions.

Shapes: B rows, P thinking positions, R thoughts per position, m talk steps, k thought tokens. All in fp32.
Source: arXiv 2403.09629, section 4; the exact forms are those of the authors' published code.
"""

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Average the values where mask is True; 0, with gradient 0, if it is nowhere."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


def mixed_weights(
    target_valid: Tensor, num_thoughts: int, items: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Return the weight of every mixed NLL in the loss, [B, P, R, m] fp32; target_valid [B, P, 1, m].

    The loss averages each talk step over its own targets, then the steps that have targets. items: number of
    targets of each step, [m], in this batch and in the whole batch that it is a part of; the weights of all
    parts add up to 1.
    """
    valid = target_valid.float().expand(-1, -1, num_thoughts, -1)
    counts = valid.sum((0, 1, 2))
    own, whole = items or (counts, counts)
    return valid / counts.clamp(min=1) / (whole > 0).sum().clamp(min=1) * (own / whole.clamp(min=1))


def mixed_loss(
    mixed_nll: Tensor, target_valid: Tensor, items: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return (loss weighted by `mixed_weights`, mean NLL of each talk step [m]).

    mixed_nll [B, P, R, m], target_valid [B, P, 1, m].
    """
    weights = mixed_weights(target_valid, mixed_nll.shape[2], items)
    by_step = (weights * torch.where(weights > 0, mixed_nll, 0)).sum((0, 1, 2))
    return by_step.sum(), by_step / weights.sum((0, 1, 2)).clamp(min=torch.finfo(weights.dtype).tiny)


@torch.no_grad()
def reward(base_nll: Tensor, mixed_nll: Tensor, target_valid: Tensor) -> Tensor:
    """Compute R = sum_j (NLL_base - NLL_mixed) over the targets, [B, P, R].

    base_nll and target_valid [B, P, 1, m], mixed_nll [B, P, R, m].
    """
    return torch.where(target_valid, base_nll - mixed_nll, 0).sum(-1)


@torch.no_grad()
def advantage(reward: Tensor, rewarded: Tensor, kind: str = "paper") -> Tensor:
    """Compute A = relu(R - mean of R over the thoughts of a position), or relu(R) with one thought.

    reward [B, P, R], rewarded [B, P] bool -> [B, P, R], 0 where not rewarded. kind "normalized" divides by
    the standard deviation, over the rewarded thoughts of the batch, of the values before relu.
    """
    centred = reward - reward.mean(-1, keepdim=True) if reward.shape[-1] > 1 else reward
    if kind == "normalized":
        chosen = centred[rewarded]
        spread = chosen.std() if chosen.numel() > 1 else centred.new_ones(())
        centred = centred / spread.clamp(min=torch.finfo(centred.dtype).eps)
    return torch.where(rewarded[..., None], centred.clamp(min=0), 0)


def policy_weights(advantage: Tensor, thought_length: int, rewarded_thoughts: Tensor | int) -> Tensor:
    """Return the weight of -log p(c_i) for each of M thoughts, [M]: A / k / rewarded_thoughts.

    The policy loss is the mean of -A * log p(c_i) over thought tokens and rewarded thoughts. Thoughts with
    A = 0 may be left out of the M, because they add nothing, but count in rewarded_thoughts.
    """
    return advantage / max(thought_length, 1) / torch.as_tensor(rewarded_thoughts).clamp(min=1)


@torch.no_grad()
def spread(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return (mean, standard deviation) of the values where mask is True; zeros if it is nowhere."""
    mask = mask.expand_as(values)
    mean = masked_mean(values, mask)
    return mean, masked_mean((values - mean) ** 2, mask).sqrt()


def gradient_norms(losses: dict[str, Tensor], parameters: list[Tensor]) -> dict[str, float]:
    """Compute the gradient norm of each named loss over the parameters; the graph is kept.

    It shows when the policy's gradient exceeds the NLL's by orders of magnitude, as the mixing weight grows.
    """
    norms = {}
    for name, loss in losses.items():
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        norms[name] = float(torch.stack([g.float().norm() for g in grads if g is not None]).norm())
    return norms
