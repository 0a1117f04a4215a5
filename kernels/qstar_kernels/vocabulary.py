"""What a language model's head is asked for, row by row, without ever holding all logits.

Every function works on chunks of rows inside a bounded workspace and gives fp32 (fp64 for fp64 inputs)
whatever the dtype of the hidden states: rewards are differences of NLLs of about 1e-3, which bf16 rounds to
zero. Legend: M rows, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

_F = TypeVar("_F", bound=Callable[..., Any])

WORKSPACE_BYTES = 128 << 20  # of one chunk of fp32 logits: 1,024 rows of 32k, large enough for fast products


class Workspace:
    """Memory for one chunk of logits, kept from call to call: on a CPU a fresh page costs more than its
    logits."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def take(self, rows: int, V: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[rows, V], not initialised, overwritten by whoever takes next."""
        old = self._memory
        if old is None or old.numel() < rows * V or (old.dtype, old.device) != (dtype, device):
            self._memory = torch.empty(rows * V, dtype=dtype, device=device)
        return self._memory[: rows * V].view(rows, V)  # type: ignore[index]


@dataclass(frozen=True)
class LinearHead:
    """hidden -> logits: softcap * tanh((hidden @ weight.T + bias) * logit_scale / softcap).

    weight [V, D]; bias [V] or None; logit_scale as in Cohere and (its reciprocal) Granite; softcap as in
    Gemma 2.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    workspace: Workspace = field(default_factory=Workspace, repr=False, compare=False)

    def only(self, tokens: Tensor) -> LinearHead:
        """The head of a part of the vocabulary, tokens [S] int64: a softmax renormalised over these alone."""
        bias = None if self.bias is None else self.bias[tokens]
        return LinearHead(self.weight[tokens], bias, self.logit_scale, self.softcap)


def chunk_rows(vocabulary: int, bytes_per_logit: int = 4) -> int:
    """Rows of a chunk, so that its logits fit the workspace; at least 16, for the matrix product's sake."""
    return max(16, WORKSPACE_BYTES // (vocabulary * bytes_per_logit))


def _high(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _linear(hidden: Tensor, head: LinearHead, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """(hidden @ weight.T + bias) * logit_scale in high precision; `weight` is head.weight, perhaps cast
    already."""
    high = _high(hidden)
    half = hidden.dtype == weight.dtype and hidden.dtype in (torch.bfloat16, torch.float16)
    if half and hidden.is_cuda:  # tensor cores round the inputs only; the sum and the result stay fp32
        z = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        z = torch.mm(hidden.to(high), weight.to(high).T, out=out)
    if head.bias is not None:
        z += head.bias.to(high)
    if head.logit_scale != 1.0:
        z *= head.logit_scale
    return z


def _weight(hidden: Tensor, head: LinearHead) -> Tensor:
    """The head's weight as the chunks will use it: cast once, not once a chunk."""
    if hidden.is_cuda and hidden.dtype == head.weight.dtype:
        return head.weight
    return head.weight.to(_high(hidden))


def _cap(z: Tensor, softcap: float | None) -> Tensor:
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def _chunks(hidden: Tensor, head: LinearHead, rows: int | None):
    """Yield (slice, logits [m, V] in high precision, overwritten by the next chunk)."""
    V, high = len(head.weight), _high(hidden)
    rows = rows or chunk_rows(V, high.itemsize)
    weight = _weight(hidden, head)
    buffer = head.workspace.take(min(rows, len(hidden)), V, high, hidden.device)
    for first in range(0, len(hidden), rows):
        at = slice(first, min(first + rows, len(hidden)))
        yield at, _cap(_linear(hidden[at], head, weight, buffer[: at.stop - first]), head.softcap)


def _check(head: LinearHead, *hidden: Tensor, rows: int | None = None) -> None:
    V, D = head.weight.shape
    if rows is not None and rows < 1:
        raise ValueError(f"rows = {rows}: must be at least 1, or None for as many as fit the workspace")
    for x in hidden:
        if x.ndim != 2 or x.shape[1] != D:
            raise ValueError(f"hidden has shape {tuple(x.shape)}: must be [rows, {D}]")
    if head.bias is not None and head.bias.shape != (V,):
        raise ValueError(f"bias has shape {tuple(head.bias.shape)}: must be [{V}]")


def _check_ids(name: str, ids: Tensor, rows: int, V: int) -> None:
    if ids.shape != (rows,) or ids.dtype != torch.long:
        raise ValueError(
            f"{name} is {ids.dtype} of shape {tuple(ids.shape)}: must be int64 of shape {(rows,)}"
        )
    if not ids.is_cuda and bool(((ids < 0) | (ids >= V)).any()):  # on a GPU the gather itself asserts
        raise ValueError(f"{name} = {int(ids[(ids < 0) | (ids >= V)][0])}: must be in [0, {V})")


def _check_suppress(suppress: Tensor | None, V: int) -> None:
    if suppress is None:
        return
    if suppress.ndim != 1 or suppress.dtype != torch.long or len(suppress) >= V:
        raise ValueError(
            f"suppress is {suppress.dtype} of shape {tuple(suppress.shape)}: must be int64 [S] with S < {V}"
        )
    _check_ids("suppress", suppress, len(suppress), V)


def _check_prediction(
    name: str, ids: Tensor, rows: int, V: int, temperature: float, suppress: Tensor | None
) -> None:
    _check_ids(name, ids, rows, V)
    if temperature <= 0:
        raise ValueError(f"temperature = {temperature}: must be positive")
    _check_suppress(suppress, V)
    if suppress is not None and not ids.is_cuda and bool(torch.isin(ids, suppress).any()):
        raise ValueError(f"{name} = {int(ids[torch.isin(ids, suppress)][0])}: is one of the suppressed ids")


def _without_autocast(function: _F) -> _F:
    @wraps(function)
    def wrapped(*args, **kwargs):
        device = next(x.device for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        with torch.autocast(device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


@_without_autocast
def logits(hidden: Tensor, head: LinearHead) -> Tensor:
    """All logits of a few rows: hidden [M, D] -> [M, V] in high precision, differentiable."""
    _check(head, hidden)
    high = _high(hidden)
    z = hidden.to(high) @ head.weight.to(high).T
    if head.bias is not None:
        z = z + head.bias.to(high)
    z = z * head.logit_scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


@_without_autocast
def mixed_logits(base_hidden: Tensor, thought_hidden: Tensor, mix_weight: Tensor, head: LinearHead) -> Tensor:
    """All of (1 - w) * logits(base) + w * logits(thought) of a few rows: base, thought [M, D], w [M] ->
    [M, V] in high precision, differentiable."""
    _check_mixture(base_hidden, thought_hidden, mix_weight, head)
    if head.softcap is None:
        return logits(_mix(base_hidden, thought_hidden, mix_weight), head)
    w = mix_weight.to(_high(base_hidden))[:, None]
    return (1 - w) * logits(base_hidden, head) + w * logits(thought_hidden, head)


class _Gradients:
    """Sums of d(loss) to hidden [M, D], weight [V, D] and bias [V], from chunks of probabilities."""

    def __init__(self, needed, hidden: Tensor, head: LinearHead, tokens: Tensor, temperature: float):
        high, weight = _high(hidden), head.weight
        self.source, self.tokens, self.softcap = hidden, tokens, head.softcap
        self.constant = head.logit_scale / temperature
        self.needed = any(needed[:3])
        self.cast = weight.to(high) if needed[0] else weight
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = torch.zeros(weight.shape, dtype=high, device=weight.device) if needed[1] else None
        self.bias = torch.zeros(len(weight), dtype=high, device=weight.device) if needed[2] else None

    def slope(self, z: Tensor) -> Tensor | None:
        """d(capped logit) / d(logit), from the capped logits."""
        return None if self.softcap is None else 1 - (z / self.softcap) ** 2

    def add(self, at: slice, p: Tensor, slope: Tensor | None, row_grad: Tensor) -> None:
        """p [m, V], overwritten: the softmax of the chunk's rows; row_grad [m]: d(loss) / d(their NLL). What
        multiplies a whole row is applied to its hidden state, not to its V logits."""
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


class _TokenNLL(torch.autograd.Function):
    """-log softmax(logits / temperature)[token], over the tokens that are not suppressed: [M].

    Forward keeps nothing of the logits; backward makes them again, chunk by chunk. The softmaxes run in
    place, row by row inside the cache.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, head, tokens, temperature, suppress, rows):
        result = hidden.new_empty(len(hidden), dtype=_high(hidden))
        for at, z in _chunks(hidden, head, rows):
            log_p = torch.log_softmax(_at_temperature(z, suppress, temperature), dim=1, out=z)
            result[at] = -log_p.gather(1, tokens[at, None]).squeeze(1)
        ctx.save_for_backward(hidden, weight, bias, tokens, suppress)
        ctx.settings = head.logit_scale, head.softcap, head.workspace, temperature, rows
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, weight, bias, tokens, suppress = ctx.saved_tensors
        *described, temperature, rows = ctx.settings
        head = LinearHead(weight, bias, *described)
        sums = _Gradients(ctx.needs_input_grad, hidden, head, tokens, temperature)
        for at, z in _chunks(hidden, head, rows):
            slope = sums.slope(z)
            p = torch.softmax(_at_temperature(z, suppress, temperature), dim=1, out=z)
            sums.add(at, p, slope, grad[at])
        d_weight = None if sums.weight is None else sums.weight.to(weight.dtype)
        d_bias = None if sums.bias is None else sums.bias.to(bias.dtype)
        return sums.hidden, d_weight, d_bias, None, None, None, None, None


class _WeightedNLL(torch.autograd.Function):
    """(sum of weights * NLL, NLL [M] without gradient): the weights being known, one pass over the logits
    gives the gradients too, and backward only scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, head, tokens, weights, temperature, suppress, rows):
        result = hidden.new_empty(len(hidden), dtype=_high(hidden))
        sums = _Gradients(ctx.needs_input_grad, hidden, head, tokens, temperature)
        for at, z in _chunks(hidden, head, rows):
            slope = sums.slope(z) if sums.needed else None
            result[at], p = _nll_and_softmax(_at_temperature(z, suppress, temperature), tokens[at])
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


def _nll_and_softmax(z: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """-log softmax(z)[token] [m] of z [m, V], and softmax(z) in z's place, by one exponential a logit."""
    top, at_token = z.amax(dim=1), z.gather(1, tokens[:, None]).squeeze(1)
    p = torch.softmax(z, dim=1, out=z)
    # the largest probability is exp(top - lse), and never small
    return (top - at_token) - p.amax(dim=1).log(), p


def _at_temperature(z: Tensor, suppress: Tensor | None, temperature: float) -> Tensor:
    """z / temperature in place, the suppressed ids at -inf; its rows shifted, so that no temperature
    overflows."""
    if suppress is not None:
        z.index_fill_(1, suppress, -torch.inf)
    if temperature != 1.0:
        z.sub_(z.amax(dim=1, keepdim=True)).div_(temperature)
    return z


@_without_autocast
def nll(hidden: Tensor, head: LinearHead, targets: Tensor, rows: int | None = None) -> Tensor:
    """-log softmax(logits)[target]: hidden [M, D], targets [M] int64 -> [M]; gradients to hidden, weight and
    bias.

    rows: rows of a chunk (default: as many as fit the workspace). Raises ValueError for a target outside [0,
    V).
    """
    _check(head, hidden, rows=rows)
    _check_ids("targets", targets, len(hidden), len(head.weight))
    return _TokenNLL.apply(hidden, head.weight, head.bias, head, targets, 1.0, None, rows)


@_without_autocast
def weighted_nll(
    hidden: Tensor,
    head: LinearHead,
    targets: Tensor,
    weights: Tensor,
    temperature: float = 1.0,
    suppress: Tensor | None = None,
    rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(sum of weights * NLL, with gradients to hidden, weight and bias; NLL [M], without).

    NLL = -log softmax(logits / temperature)[target], the suppressed ids [S] left out of the softmax; hidden
    [M, D], targets [M] int64, weights [M] without gradient. A quarter less arithmetic than `nll` and its
    backward, for a gradient of the head's size that is kept from forward to backward. Raises as `log_prob`
    does.
    """
    _check(head, hidden, rows=rows)
    _check_prediction("targets", targets, len(hidden), len(head.weight), temperature, suppress)
    if weights.shape != targets.shape:
        raise ValueError(f"weights has shape {tuple(weights.shape)}: must be {tuple(targets.shape)}")
    return _WeightedNLL.apply(
        hidden, head.weight, head.bias, head, targets, weights.detach(), float(temperature), suppress, rows
    )


@_without_autocast
def log_prob(
    hidden: Tensor,
    head: LinearHead,
    tokens: Tensor,
    temperature: float = 1.0,
    suppress: Tensor | None = None,
    rows: int | None = None,
) -> Tensor:
    """log softmax(logits / temperature)[token], the suppressed ids [S] left out of the softmax: -> [M], with
    gradients.

    Raises ValueError for a token outside [0, V) or itself suppressed, and a temperature that is not positive.
    """
    _check(head, hidden, rows=rows)
    _check_prediction("tokens", tokens, len(hidden), len(head.weight), temperature, suppress)
    return -_TokenNLL.apply(hidden, head.weight, head.bias, head, tokens, float(temperature), suppress, rows)


@_without_autocast
def mixed_nll(
    base_hidden: Tensor,
    thought_hidden: Tensor,
    mix_weight: Tensor,
    head: LinearHead,
    targets: Tensor,
    rows: int | None = None,
) -> Tensor:
    """NLL under (1 - w) * logits(base) + w * logits(thought): base, thought [M, D], w and targets [M] -> [M].

    A head without soft-cap is linear: there it is the NLL of the mixed hidden state, in high precision.
    """
    _check_mixture(base_hidden, thought_hidden, mix_weight, head, rows)
    _check_ids("targets", targets, len(base_hidden), len(head.weight))
    if head.softcap is None:
        return nll(_mix(base_hidden, thought_hidden, mix_weight), head, targets, rows)
    return _capped_mixed_nll(base_hidden, thought_hidden, mix_weight, head, targets, rows)


@_without_autocast
def weighted_mixed_nll(
    base_hidden: Tensor,
    thought_hidden: Tensor,
    mix_weight: Tensor,
    head: LinearHead,
    targets: Tensor,
    weights: Tensor,
    rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(sum of weights * `mixed_nll`, with gradients; `mixed_nll` [M], without); see `weighted_nll`."""
    _check_mixture(base_hidden, thought_hidden, mix_weight, head, rows)
    _check_ids("targets", targets, len(base_hidden), len(head.weight))
    if head.softcap is None:
        mixed = _mix(base_hidden, thought_hidden, mix_weight)
        return weighted_nll(mixed, head, targets, weights, rows=rows)
    each = _capped_mixed_nll(base_hidden, thought_hidden, mix_weight, head, targets, rows)
    return (weights.detach() * each).sum(), each.detach()


def _check_mixture(base_hidden, thought_hidden, mix_weight, head, rows=None) -> None:
    _check(head, base_hidden, thought_hidden, rows=rows)
    if thought_hidden.shape != base_hidden.shape:
        raise ValueError(
            f"thought_hidden has shape {tuple(thought_hidden.shape)}: must be that of base_hidden, "
            f"{tuple(base_hidden.shape)}"
        )
    if mix_weight.shape != (len(base_hidden),):
        raise ValueError(
            f"mix_weight has shape {tuple(mix_weight.shape)}: must be {(len(base_hidden),)}, one a row"
        )


def _mix(base: Tensor, thought: Tensor, mix_weight: Tensor) -> Tensor:
    high = _high(base)
    w = mix_weight.to(high)[:, None]
    return (1 - w) * base.to(high) + w * thought.to(high)


def _capped_mixed_nll(base, thought, mix_weight, head: LinearHead, targets, rows: int | None) -> Tensor:
    """A soft-capped head is not linear: both sets of logits are made, and made again in backward."""
    high = _high(base)
    rows = rows or max(chunk_rows(len(head.weight), high.itemsize) // 4, 1)
    parts = [base.new_empty(0, dtype=high)]
    for first in range(0, len(targets), rows):
        at = slice(first, first + rows)
        chunk = (base[at], thought[at], mix_weight[at], head, targets[at])
        parts.append(torch.utils.checkpoint.checkpoint(_capped_chunk, *chunk, use_reentrant=False))
    return torch.cat(parts)


def _capped_chunk(base: Tensor, thought: Tensor, w: Tensor, head: LinearHead, targets: Tensor) -> Tensor:
    mixed = mixed_logits(base, thought, w, head)
    return torch.nn.functional.cross_entropy(mixed, targets, reduction="none")


@torch.no_grad()
@_without_autocast
def nll_by_temperature(
    hidden: Tensor, head: LinearHead, targets: Tensor, temperatures: Tensor, rows: int | None = None
) -> Tensor:
    """-log softmax(logits / T)[target] for each temperature T of [S], from one set of logits: hidden [M, D],
    targets [M] int64 -> [M, S], no gradient."""
    _check(head, hidden, rows=rows)
    _check_ids("targets", targets, len(hidden), len(head.weight))
    if temperatures.ndim != 1 or bool((temperatures <= 0).any()):
        raise ValueError(f"temperatures = {temperatures.tolist()}: must be positive, [S]")
    result = hidden.new_empty(len(hidden), len(temperatures), dtype=_high(hidden))
    for at, z in _chunks(hidden, head, rows):
        z.sub_(z.amax(dim=1, keepdim=True))  # so that no temperature overflows
        at_target = z.gather(1, targets[at, None]).squeeze(1)
        for i, temperature in enumerate(temperatures.tolist()):
            result[at, i] = torch.logsumexp(z / temperature, dim=1) - at_target / temperature
    return result


@torch.no_grad()
@_without_autocast
def entropy(hidden: Tensor, head: LinearHead, rows: int | None = None) -> Tensor:
    """Entropy of softmax(logits) in nats: hidden [M, D] -> [M], no gradient."""
    _check(head, hidden, rows=rows)
    result = hidden.new_empty(len(hidden), dtype=_high(hidden))
    for at, z in _chunks(hidden, head, rows):
        log_p = torch.log_softmax(z, dim=1, out=z)
        result[at] = -(log_p.exp() * log_p).sum(1)
    return result


@torch.no_grad()
@_without_autocast
def sample(
    hidden: Tensor,
    head: LinearHead,
    temperature: float = 1.0,
    suppress: Tensor | None = None,
    generator: torch.Generator | None = None,
    rows: int | None = None,
    uniform: Tensor | None = None,
) -> Tensor:
    """Draw a token for each row from softmax(logits / temperature) without the suppressed ids [S]: -> [M]
    int64.

    temperature 0 is argmax. Otherwise the inverse of the distribution function at one uniform number a row,
    drawn for all rows at once: exact, and the same for any chunk size. The Gumbel form of the same draw would
    need V random numbers a row, which on a CPU cost more than the logits. uniform [M] fp64 in [0, 1): these
    numbers instead of the generator's.
    """
    _check(head, hidden, rows=rows)
    _check_suppress(suppress, len(head.weight))
    if temperature < 0:
        raise ValueError(f"temperature = {temperature}: must be at least 0")
    tokens = torch.empty(len(hidden), dtype=torch.long, device=hidden.device)
    if uniform is None:
        source = hidden.device if generator is None else generator.device
        uniform = torch.rand(len(hidden), dtype=torch.float64, generator=generator, device=source)
    elif uniform.shape != tokens.shape or uniform.dtype != torch.float64:
        raise ValueError(
            f"uniform is {uniform.dtype} of shape {tuple(uniform.shape)}: must be float64 of shape "
            f"{tuple(tokens.shape)}"
        )
    uniform = uniform.to(hidden.device)
    for at, z in _chunks(hidden, head, rows):
        z = _at_temperature(z, suppress, temperature or 1.0)
        if temperature == 0:
            tokens[at] = z.argmax(dim=1)
        else:
            tokens[at] = _invert(torch.softmax(z, dim=1, out=z), uniform[at])
    return tokens


_GROUP = 128


def _invert(p: Tensor, uniform: Tensor) -> Tensor:
    """First index where the running sum of p [M, V] (not normalised) exceeds uniform * its total.

    In two levels, groups of 128 and then inside one: the running sums stay short, so they are accurate and
    quick.
    """
    M, V = p.shape
    whole = V // _GROUP * _GROUP
    sums = p[:, :whole].view(M, -1, _GROUP).sum(-1)
    if whole < V:
        sums = torch.cat([sums, p[:, whole:].sum(-1, keepdim=True)], dim=1)
    running = sums.double().cumsum(1)
    wanted = uniform * running[:, -1]
    group = torch.searchsorted(running, wanted[:, None], right=True).squeeze(1)
    # rounding may point past the end, or at a group without probability: step back to the last that has some
    last = _last_positive(sums)
    group = torch.minimum(group, last)
    rest = wanted - torch.where(group > 0, running.gather(1, (group - 1).clamp(min=0)[:, None]).squeeze(1), 0)
    columns = group[:, None] * _GROUP + torch.arange(_GROUP, device=p.device)
    inside = p.gather(1, columns.clamp(max=V - 1)).masked_fill(columns >= V, 0)
    at = torch.searchsorted(inside.double().cumsum(1), rest[:, None], right=True).squeeze(1)
    return group * _GROUP + torch.minimum(at, _last_positive(inside))


def _last_positive(values: Tensor) -> Tensor:
    """[M]: the last column of [M, K] that is positive."""
    column = torch.arange(values.shape[1], device=values.device)
    return torch.where(values > 0, column, 0).amax(dim=1)
