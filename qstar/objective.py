"""From NLLs and log-probabilities to losses, rewards and metrics: pure functions, no model in sight.

Shapes: B rows, P thinking positions, R thoughts per position, m talk steps, k thought tokens. All in fp32.
Source: arXiv 2403.09629, section 4; the exact forms are those of the authors' published code.
"""

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values where mask is True; 0 (with a gradient of 0) when it is nowhere."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


def mixed_weights(
    target_valid: Tensor, num_thoughts: int, items: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Weight of every mixed NLL in the loss, [B, P, R, m] fp32: each talk step is averaged over its own
    targets, and the steps that have any are averaged. target_valid [B, P, 1, m].

    items: targets of each step [m], of this batch and of the whole that it is a part of: the weights of all
    parts then add up to 1.
    """
    valid = target_valid.float().expand(-1, -1, num_thoughts, -1)
    counts = valid.sum((0, 1, 2))
    own, whole = items or (counts, counts)
    return valid / counts.clamp(min=1) / (whole > 0).sum().clamp(min=1) * (own / whole.clamp(min=1))


def mixed_loss(
    mixed_nll: Tensor, target_valid: Tensor, items: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """mixed_nll [B, P, R, m], target_valid [B, P, 1, m] -> (loss by `mixed_weights`, mean NLL of each talk
    step [m])."""
    weights = mixed_weights(target_valid, mixed_nll.shape[2], items)
    by_step = (weights * torch.where(weights > 0, mixed_nll, 0)).sum((0, 1, 2))
    return by_step.sum(), by_step / weights.sum((0, 1, 2)).clamp(min=torch.finfo(weights.dtype).tiny)


@torch.no_grad()
def reward(base_nll: Tensor, mixed_nll: Tensor, target_valid: Tensor) -> Tensor:
    """R = sum_j (NLL_base - NLL_mixed) over the targets: base_nll [B, P, 1, m], mixed_nll [B, P, R, m] -> [B,
    P, R]."""
    return torch.where(target_valid, base_nll - mixed_nll, 0).sum(-1)


@torch.no_grad()
def advantage(reward: Tensor, rewarded: Tensor, kind: str = "paper") -> Tensor:
    """A = relu(R - mean over the thoughts of a position); with one thought there is no mean: relu(R).

    reward [B, P, R], rewarded [B, P] bool -> [B, P, R], 0 where not rewarded. kind "normalized" divides
    by the standard deviation of what is clamped, over the rewarded thoughts of the batch.
    """
    centred = reward - reward.mean(-1, keepdim=True) if reward.shape[-1] > 1 else reward
    if kind == "normalized":
        chosen = centred[rewarded]
        spread = chosen.std() if chosen.numel() > 1 else centred.new_ones(())
        centred = centred / spread.clamp(min=torch.finfo(centred.dtype).eps)
    return torch.where(rewarded[..., None], centred.clamp(min=0), 0)


def policy_weights(advantage: Tensor, thought_length: int, rewarded_thoughts: Tensor | int) -> Tensor:
    """Weight of -log p(c_i) for each of M thoughts, [M]: A / k / rewarded_thoughts.

    The policy loss is the mean over thought tokens and rewarded thoughts of -A * log p(c_i). Thoughts without
    a positive advantage add exactly 0 to it, so they need not be among the M, but they count in the mean.
    """
    return advantage / max(thought_length, 1) / torch.as_tensor(rewarded_thoughts).clamp(min=1)


@torch.no_grad()
def spread(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, standard deviation) of the values where mask is True; zeros when it is nowhere."""
    mask = mask.expand_as(values)
    mean = masked_mean(values, mask)
    return mean, masked_mean((values - mean) ** 2, mask).sqrt()


def gradient_norms(losses: dict[str, Tensor], parameters: list[Tensor]) -> dict[str, float]:
    """The gradient norm of each named loss over the parameters, apart; the graph is kept for the backward to
    come.

    As the mixing weight grows, the policy term's gradient can exceed the NLL's by orders of magnitude; this
    shows it.
    """
    norms = {}
    for name, loss in losses.items():
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        norms[name] = float(torch.stack([g.float().norm() for g in grads if g is not None]).norm())
    return norms
