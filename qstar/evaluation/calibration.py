"""Find the entropy of the base prediction above which a thought is worth its time."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Threshold:
    """Thinking where the base entropy exceeds entropy_threshold (nats) keeps gain_kept of all gain in NLL, at
    thinking_share of the tokens."""

    entropy_threshold: float
    gain_kept: float
    thinking_share: float


def threshold(base_entropy: Tensor, gain: Tensor, keep: float) -> Threshold:
    """Find the fewest tokens that keep the share `keep` of the thoughts' gain.

    base_entropy [tokens] in nats; gain [tokens] = base NLL - mixed NLL. Raises ValueError if thoughts gain
    nothing in all.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep = {keep}: must be in (0, 1]")
    total = float(gain.double().sum())
    if not total > 0:
        mean = total / max(1, len(gain))
        raise ValueError(
            f"text: on its {len(gain)} tokens thoughts gain {mean:.4f} nats a token: none to keep"
        )
    entropy, order = base_entropy.sort(descending=True, stable=True)
    kept = gain.double()[order].cumsum(0) / total
    # thinking on tokens 0 .. i needs a threshold below entropy i, and equal ones go together
    last_of_equals = torch.ones_like(entropy, dtype=torch.bool)
    last_of_equals[:-1] = entropy[1:] < entropy[:-1]
    enough = ((kept >= keep - 1e-12) & last_of_equals).nonzero()
    i = int(enough[0]) if len(enough) else len(entropy) - 1
    below = float(entropy[i + 1]) if i + 1 < len(entropy) else 0.0
    return Threshold(below, float(kept[i]), (i + 1) / len(entropy))
