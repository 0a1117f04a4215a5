"""Means with bootstrap intervals, and paired differences of them.

Clusters are drawn again with replacement: questions, or the texts that tokens lie in, since tokens of one
text are alike. Every condition sees the same draws, so differences are paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Sums:
    """The values of one condition: sums[c] of counts[c] values in each cluster c, fp64 [C]."""

    sums: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, values: Sequence[float]) -> Sums:
        """Take each value as a cluster."""
        return cls(np.asarray(values, dtype=np.float64), np.ones(len(values)))

    @classmethod
    def by_cluster(cls, values: np.ndarray, cluster: np.ndarray, chosen: np.ndarray | None = None) -> Sums:
        """Sum values [N] by cluster [N], numbers from 0; only those chosen, bool [N], if it is given."""
        one = np.ones(len(values)) if chosen is None else chosen.astype(np.float64)
        count = int(cluster.max()) + 1
        return cls(np.bincount(cluster, values * one, count), np.bincount(cluster, one, count))


@dataclass(frozen=True)
class Estimate:
    """A mean over n values, and its interval."""

    mean: float
    low: float
    high: float
    n: int


def estimates(
    of: dict[str, Sums], pairs: Sequence[tuple[str, str]], seed: int = 0
) -> tuple[dict[str, Estimate], dict[tuple[str, str], Estimate]]:
    """Estimate the mean of each condition and the difference a - b of each pair, with percentile intervals.

    All conditions have the same clusters and counts. A draw in which nothing is counted, possible with a few
    hard tokens in a few texts, is left out.
    """
    names = list(of)
    counts = of[names[0]].counts
    sums = np.stack([of[name].sums for name in names], 1)
    clusters, n = len(counts), int(counts.sum())
    source = np.random.default_rng(seed)
    drawn = []
    for _ in range(RESAMPLES // 500):  # 500 at a time, to bound the memory
        times = source.multinomial(clusters, np.full(clusters, 1 / clusters), size=500)
        total = times @ counts
        drawn.append((times @ sums)[total > 0] / total[total > 0, None])
    means, spread = sums.sum(0) / n, np.concatenate(drawn)
    at = {name: i for i, name in enumerate(names)}

    def estimate(mean: float, values: np.ndarray) -> Estimate:
        low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Estimate(float(mean), float(low), float(high), n)

    alone = {name: estimate(means[i], spread[:, i]) for name, i in at.items()}
    differences = {
        (a, b): estimate(means[at[a]] - means[at[b]], spread[:, at[a]] - spread[:, at[b]]) for a, b in pairs
    }
    return alone, differences
