"""Speculative sampling: drafted tokens are kept so that the text is distributed as if none had been drafted.

Source: arXiv 2211.17192, 2302.01318. Legend: B rows, n positions of which the first n - 1 were drafted, V
vocabulary.
"""

import torch
from torch import Tensor


def accept_greedy(scores: Tensor, drafts: Tensor) -> tuple[Tensor, Tensor]:
    """scores [B, n, V]; drafts [B, n - 1] -> (how many drafts of each row are the argmax, before the first
    that is not [B]; the token after them [B])."""
    best = scores.argmax(-1)
    count = (best[:, :-1] == drafts).long().cumprod(1).sum(1)
    return count, best.gather(1, count[:, None]).squeeze(1)


def accept_sampled(
    wanted: Tensor, drafted_from: Tensor, drafts: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """wanted [B, n, V]: the distribution of each position; drafted_from [B, n - 1, V]: what drafts [B, n - 1]
    were drawn from. A draft x is kept with probability min(1, wanted(x) / drafted_from(x)); in place of the
    first that is not, a token is drawn from the positive part of their difference; after the last, from
    wanted.

    Returns (how many drafts of each row are kept [B], the token after them [B]).
    """
    B, n, _ = wanted.shape
    at = drafts[..., None]
    chance = torch.rand(B, n - 1, generator=generator, device=wanted.device, dtype=wanted.dtype)
    # not a division: a draft of probability zero cannot occur, and 0 / 0 must not
    kept = chance * drafted_from.gather(2, at).squeeze(2) < wanted[:, :-1].gather(2, at).squeeze(2)
    count = kept.long().cumprod(1).sum(1)
    row = torch.arange(B, device=wanted.device)
    rest = wanted[row, count]
    if n > 1:
        rejected = (count < n - 1)[:, None]
        from_draft = drafted_from[row, count.clamp(max=n - 2)]
        difference = (rest - from_draft).clamp(min=0)
        # equal but for rounding: then the draft was as good as any
        usable = rejected & (difference.sum(1, keepdim=True) > 0)
        rest = torch.where(usable, difference, rest)
    return count, torch.multinomial(rest, 1, generator=generator).squeeze(1)


class DraftLength:
    """How many tokens to draft: what gives the most tokens for the time, by the acceptance seen so far.

    The unit of cost is a model step of one token a row; a step of one more token costs `WIDER` more (of a
    model whose steps are bound by reading its weights, little). It depends on nothing but the acceptance, so
    the same seed gives the same text.
    """

    MOST = 16
    WIDER = 0.08
    MEMORY = 0.95  # of earlier rounds, in each round

    def __init__(self, thought_steps: int, fixed: int | None = None):
        """thought_steps: model steps of a thought; fixed: always this many."""
        self.thought_steps, self.fixed = thought_steps, fixed
        self.accepted, self.tested = 4.0, 5.0  # before anything is seen: 80 %

    def next(self) -> int:
        if self.fixed is not None:
            return self.fixed
        chance = self.accepted / self.tested
        return max(range(self.MOST + 1), key=lambda g: self._gain(g, chance))

    def _gain(self, g: int, chance: float) -> float:
        tokens = sum(chance**i for i in range(g + 1))
        return tokens / (g + 1 + self.thought_steps * (1 + self.WIDER * g))

    def saw(self, accepted: int, tested: int) -> None:
        """Of `tested` drafts, `accepted` were kept."""
        self.accepted = self.MEMORY * self.accepted + accepted
        self.tested = self.MEMORY * self.tested + tested
