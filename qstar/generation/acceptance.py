"""Accept drafted tokens so that the text has the distribution of sampling without drafts.

Source: arXiv 2211.17192, 2302.01318. B rows, n positions of which n - 1 have a draft, V vocabulary.
"""

import torch
from torch import Tensor


def accept_greedy(scores: Tensor, drafts: Tensor) -> tuple[Tensor, Tensor]:
    """Accept drafts up to the first that is not the argmax.

    scores [B, n, V], drafts [B, n - 1]. Returns (number of accepted drafts [B], the token after them [B]).
    """
    best = scores.argmax(-1)
    count = (best[:, :-1] == drafts).long().cumprod(1).sum(1)
    return count, best.gather(1, count[:, None]).squeeze(1)


def accept_sampled(
    wanted: Tensor, drafted_from: Tensor, drafts: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Accept each draft x with probability min(1, wanted(x) / drafted_from(x)), up to the first rejection.

    A rejected draft is replaced by a token sampled from relu(wanted - drafted_from); if all are accepted, one
    is sampled from wanted. wanted [B, n, V] and drafted_from [B, n - 1, V] are probabilities; drafts
    [B, n - 1]. Returns (number of accepted drafts [B], the token after them [B]).
    """
    B, n, _ = wanted.shape
    at = drafts[..., None]
    chance = torch.rand(B, n - 1, generator=generator, device=wanted.device, dtype=wanted.dtype)
    # a product, not a quotient, which could be 0 / 0
    kept = chance * drafted_from.gather(2, at).squeeze(2) < wanted[:, :-1].gather(2, at).squeeze(2)
    count = kept.long().cumprod(1).sum(1)
    row = torch.arange(B, device=wanted.device)
    rest = wanted[row, count]
    if n > 1:
        rejected = (count < n - 1)[:, None]
        from_draft = drafted_from[row, count.clamp(max=n - 2)]
        difference = (rest - from_draft).clamp(min=0)
        # without a difference, rounding alone rejected the draft
        usable = rejected & (difference.sum(1, keepdim=True) > 0)
        rest = torch.where(usable, difference, rest)
    return count, torch.multinomial(rest, 1, generator=generator).squeeze(1)


class DraftLength:
    """Choose how many tokens to draft, for the most tokens per unit of time at the acceptance seen so far.

    The unit is a model step of one token per row; each further token of a step costs `WIDER` (little, while
    steps are bound by reading the weights). No clock is read: the same seed gives the same text.
    """

    MOST = 16
    WIDER = 0.08
    MEMORY = 0.95  # weight of the earlier rounds, in each round

    def __init__(self, thought_steps: int, fixed: int | None = None):
        """Take the model steps of a thought; fixed: always draft this many tokens."""
        self.thought_steps, self.fixed = thought_steps, fixed
        self.accepted, self.tested = 4.0, 5.0  # before anything is seen: 80 %

    def next(self) -> int:
        """Return the number of tokens to draft in the next round."""
        if self.fixed is not None:
            return self.fixed
        chance = self.accepted / self.tested
        return max(range(self.MOST + 1), key=lambda g: self._gain(g, chance))

    def _gain(self, g: int, chance: float) -> float:
        tokens = sum(chance**i for i in range(g + 1))
        return tokens / (g + 1 + self.thought_steps * (1 + self.WIDER * g))

    def saw(self, accepted: int, tested: int) -> None:
        """Record that `accepted` of `tested` drafts were accepted."""
        self.accepted = self.MEMORY * self.accepted + accepted
        self.tested = self.MEMORY * self.tested + tested
