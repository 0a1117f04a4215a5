"""NLLs, log-probabilities and entropies of rows, with the gradients of the first two, in chunks of rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qstar_kernels.vocabulary.head import (
    LinearHead,
    at_temperature,
    check_hidden,
    check_ids,
    check_mixture,
    check_suppress,
    chunk_rows,
    chunks,
    mix,
    mixed_logits,
    result_dtype,
    without_autocast,
)


@without_autocast
def nll(hidden: Tensor, head: LinearHead, targets: Tensor, rows: int | None = None) -> Tensor:
    """Compute -log softmax(logits)[target] -> [M], with gradients to hidden, weight and bias.

    hidden [M, D]; targets [M] int64; rows: rows of a chunk, None for as many as fit the workspace.
    Raises ValueError for a target outside [0, V), except on a GPU, where the gather asserts.
    """
    check_hidden(head, hidden, rows=rows)
    check_ids("targets", targets, len(hidden), len(head.weight))
    return _TokenNLL.apply(hidden, head.weight, head.bias, head, targets, 1.0, None, rows)


@without_autocast
def log_prob(
    hidden: Tensor,
    head: LinearHead,
    tokens: Tensor,
    temperature: float = 1.0,
    suppress: Tensor | None = None,
    rows: int | None = None,
) -> Tensor:
    """Compute log softmax(logits / temperature)[token] -> [M], with gradients as in `nll`.

    hidden [M, D]; tokens [M] int64; suppress [S] int64: ids left out of the softmax.
    Raises ValueError for a token outside [0, V) or suppressed (unchecked on a GPU) and for a temperature that
    is not positive.
    """
    check_hidden(head, hidden, rows=rows)
    _check_prediction("tokens", tokens, len(hidden), len(head.weight), temperature, suppress)
    return -_TokenNLL.apply(hidden, head.weight, head.bias, head, tokens, float(temperature), suppress, rows)


@without_autocast
def weighted_nll(
    hidden: Tensor,
    head: LinearHead,
    targets: Tensor,
    weights: Tensor,
    temperature: float = 1.0,
    suppress: Tensor | None = None,
    rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute (sum of weights * NLL, with gradients to hidden, weight and bias; NLL [M], without).

    NLL = -log_prob(hidden, head, targets, temperature, suppress); weights [M] get no gradient.
    Saves a quarter of the arithmetic of `nll` and its backward, but keeps a gradient of the head's size from
    forward to backward. Raises ValueError as `log_prob` does.
    """
    check_hidden(head, hidden, rows=rows)
    _check_prediction("targets", targets, len(hidden), len(head.weight), temperature, suppress)
    if weights.shape != targets.shape:
        raise ValueError(f"weights has shape {tuple(weights.shape)}: must be {tuple(targets.shape)}")
    return _WeightedNLL.apply(
        hidden, head.weight, head.bias, head, targets, weights.detach(), float(temperature), suppress, rows
    )


@without_autocast
def mixed_nll(
    base_hidden: Tensor,
    thought_hidden: Tensor,
    mix_weight: Tensor,
    head: LinearHead,
    targets: Tensor,
    rows: int | None = None,
) -> Tensor:
    """Compute the NLL [M] of targets under (1 - w) * logits(base) + w * logits(thought), with gradients.

    base_hidden, thought_hidden [M, D]; mix_weight [M]; targets [M] int64. Raises ValueError as `nll` does.
    """
    check_mixture(base_hidden, thought_hidden, mix_weight, head, rows)
    if head.softcap is None:  # a linear head: mixed logits are the logits of the mixed hidden state
        return nll(mix(base_hidden, thought_hidden, mix_weight), head, targets, rows)
    return _capped_mixed_nll(base_hidden, thought_hidden, mix_weight, head, targets, rows)


@without_autocast
def weighted_mixed_nll(
    base_hidden: Tensor,
    thought_hidden: Tensor,
    mix_weight: Tensor,
    head: LinearHead,
    targets: Tensor,
    weights: Tensor,
    rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute (sum of weights * `mixed_nll`, with gradients; `mixed_nll` [M], without)."""
    check_mixture(base_hidden, thought_hidden, mix_weight, head, rows)
    if head.softcap is None:
        mixed = mix(base_hidden, thought_hidden, mix_weight)
        return weighted_nll(mixed, head, targets, weights, rows=rows)
    each = _capped_mixed_nll(base_hidden, thought_hidden, mix_weight, head, targets, rows)
    return (weights.detach() * each).sum(), each.detach()


@torch.no_grad()
@without_autocast
def nll_by_temperature(
    hidden: Tensor, head: LinearHead, targets: Tensor, temperatures: Tensor, rows: int | None = None
) -> Tensor:
    """Compute -log softmax(logits / T)[target] for every temperature T from one set of logits.

    hidden [M, D], targets [M] int64, temperatures [S] -> [M, S] without gradient.
    """
    check_hidden(head, hidden, rows=rows)
    check_ids("targets", targets, len(hidden), len(head.weight))
    if temperatures.ndim != 1 or bool((temperatures <= 0).any()):
        raise ValueError(f"temperatures = {temperatures.tolist()}: must be positive, [S]")
    result = hidden.new_empty(len(hidden), len(temperatures), dtype=result_dtype(hidden))
    for at, z in chunks(hidden, head, rows):
        z.sub_(z.amax(dim=1, keepdim=True))  # so that no temperature overflows
        at_target = z.gather(1, targets[at, None]).squeeze(1)
        for i, temperature in enumerate(temperatures.tolist()):
            result[at, i] = torch.logsumexp(z / temperature, dim=1) - at_target / temperature
    return result


@torch.no_grad()
@without_autocast
def entropy(hidden: Tensor, head: LinearHead, rows: int | None = None) -> Tensor:
    """Compute the entropy of softmax(logits) in nats: hidden [M, D] -> [M] without gradient."""
    check_hidden(head, hidden, rows=rows)
    result = hidden.new_empty(len(hidden), dtype=result_dtype(hidden))
    for at, z in chunks(hidden, head, rows):
        log_p = torch.log_softmax(z, dim=1, out=z)
        result[at] = -(log_p.exp() * log_p).sum(1)
    return result


class _TokenNLL(torch.autograd.Function):
    """-log softmax(logits / temperature)[token] [M]; backward recomputes the logits, chunk by chunk."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, head, tokens, temperature, suppress, rows):
        result = hidden.new_empty(len(hidden), dtype=result_dtype(hidden))
        for at, z in chunks(hidden, head, rows):
            log_p = torch.log_softmax(at_temperature(z, suppress, temperature), dim=1, out=z)
            result[at] = -log_p.gather(1, tokens[at, None]).squeeze(1)
        ctx.save_for_backward(hidden, weight, bias, tokens, suppress)
        ctx.settings = (head.logit_scale, head.softcap, head.workspace), temperature, rows
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, weight, bias, tokens, suppress = ctx.saved_tensors
        described, temperature, rows = ctx.settings
        head = LinearHead(weight, bias, *described)
        sums = _Gradients(ctx.needs_input_grad, hidden, head, tokens, temperature)
        for at, z in chunks(hidden, head, rows):
            slope = sums.slope(z)
            p = torch.softmax(at_temperature(z, suppress, temperature), dim=1, out=z)
            sums.add(at, p, slope, grad[at])
        d_weight = None if sums.weight is None else sums.weight.to(weight.dtype)
        d_bias = None if sums.bias is None else sums.bias.to(bias.dtype)
        return sums.hidden, d_weight, d_bias, None, None, None, None, None


class _WeightedNLL(torch.autograd.Function):
    """(sum of weights * NLL, NLL [M] without gradient).

    The weights are known in forward: one pass over the logits gives the gradients, and backward scales them.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, head, tokens, weights, temperature, suppress, rows):
        result = hidden.new_empty(len(hidden), dtype=result_dtype(hidden))
        sums = _Gradients(ctx.needs_input_grad, hidden, head, tokens, temperature)
        for at, z in chunks(hidden, head, rows):
            slope = sums.slope(z) if sums.needed else None
            result[at], p = _nll_and_softmax(at_temperature(z, suppress, temperature), tokens[at])
            if sums.needed:
                sums.add(at, p, slope, weights[at])
        ctx.save_for_backward(sums.hidden, sums.weight, sums.bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(result)
        return (weights.to(result.dtype) * result).sum(), result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        hidden, weight, bias = ctx.saved_tensors
        return (
            None if hidden is None else (hidden * grad).to(hidden.dtype),
            None if weight is None else (weight * grad).to(ctx.dtypes[0]),
            None if bias is None else (bias * grad).to(ctx.dtypes[1]),
            *(None,) * 6,
        )


class _Gradients:
    """Gradients of hidden [M, D], weight [V, D] and bias [V], summed from chunks of probabilities."""

    def __init__(self, needed, hidden: Tensor, head: LinearHead, tokens: Tensor, temperature: float):
        high, weight = result_dtype(hidden), head.weight
        self.source, self.tokens, self.softcap = hidden, tokens, head.softcap
        self.constant = head.logit_scale / temperature
        self.needed = any(needed[:3])
        self.cast = weight.to(high) if needed[0] else weight
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = torch.zeros(weight.shape, dtype=high, device=weight.device) if needed[1] else None
        self.bias = torch.zeros(len(weight), dtype=high, device=weight.device) if needed[2] else None

    def slope(self, z: Tensor) -> Tensor | None:
        """Return d(capped logit) / d(logit), from the capped logits; None without a cap."""
        return None if self.softcap is None else 1 - (z / self.softcap) ** 2

    def add(self, at: slice, p: Tensor, slope: Tensor | None, row_grad: Tensor) -> None:
        """Add a chunk: its softmax p [m, V], which is overwritten, and row_grad [m], d(loss) / d(NLL).

        Factors of a whole row multiply its D hidden values, not its V logits.
        """
        p.scatter_add_(1, self.tokens[at, None], p.new_full((len(p), 1), -1))
        if slope is not None:
            p.mul_(slope)
        row = (row_grad.to(p.dtype) * self.constant)[:, None]
        if self.hidden is not None:
            self.hidden[at] = (p @ self.cast).mul_(row)
        if self.weight is not None:
            self.weight.addmm_(p.T, self.source[at].to(p.dtype) * row)
        if self.bias is not None:
            self.bias += p.T @ row[:, 0]


def _nll_and_softmax(z: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Compute -log softmax(z)[token] [m] and, in place, softmax(z) [m, V], with one exponential per logit."""
    top, at_token = z.amax(dim=1), z.gather(1, tokens[:, None]).squeeze(1)
    p = torch.softmax(z, dim=1, out=z)
    # the largest probability is exp(top - lse), and never small
    return (top - at_token) - p.amax(dim=1).log(), p


def _capped_mixed_nll(base, thought, mix_weight, head: LinearHead, targets, rows: int | None) -> Tensor:
    """Compute `mixed_nll` from both sets of logits, as a soft-capped head is not linear."""
    check_ids("targets", targets, len(base), len(head.weight))
    high = result_dtype(base)
    rows = rows or max(chunk_rows(len(head.weight), high.itemsize) // 4, 1)
    parts = [base.new_empty(0, dtype=high)]
    for first in range(0, len(targets), rows):
        at = slice(first, first + rows)
        chunk = (base[at], thought[at], mix_weight[at], head, targets[at])
        parts.append(checkpoint(_capped_chunk, *chunk, use_reentrant=False))
    return torch.cat(parts)


def _capped_chunk(base: Tensor, thought: Tensor, w: Tensor, head: LinearHead, targets: Tensor) -> Tensor:
    mixed = mixed_logits(base, thought, w, head)
    return torch.nn.functional.cross_entropy(mixed, targets, reduction="none")


def _check_prediction(
    name: str, ids: Tensor, rows: int, V: int, temperature: float, suppress: Tensor | None
) -> None:
    check_ids(name, ids, rows, V)
    if temperature <= 0:
        raise ValueError(f"temperature = {temperature}: must be positive")
    check_suppress(suppress, V)
    if suppress is not None and not ids.is_cuda and bool(torch.isin(ids, suppress).any()):
        raise ValueError(f"{name} = {int(ids[torch.isin(ids, suppress)][0])}: is one of the suppressed ids")
