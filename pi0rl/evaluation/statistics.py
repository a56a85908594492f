"""What may be concluded from an episode table: counts, intervals, paired tests.

Every number of a report comes from the episode table (:mod:`pi0rl.evaluation.table`). An episode has three outcomes:
success, failure, error. An error is neither success nor failure: it is counted apart and takes no part in a rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from pi0rl.errors import UserError

# What names an episode within a policy's rows: two policies are paired by it.
EPISODE_KEY = ["split", "seed", "index"]


@dataclass(frozen=True)
class PairedTest:
    """Two policies on the same episodes.

    Attributes:
        gained: episodes that only the second policy solved.
        lost: episodes that only the first policy solved.
        n: pairs in all.
        p: two-sided p-value of the exact McNemar test, in (0, 1].
    """

    gained: int
    lost: int
    n: int
    p: float


def wilson_interval(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a success rate with `k` successes in `n` >= 1 episodes (Wilson 1927), in [0, 1]."""
    interval = stats.binomtest(k, n).proportion_ci(confidence_level=confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(before: Sequence[bool] | np.ndarray, after: Sequence[bool] | np.ndarray) -> PairedTest:
    """The exact McNemar test of two success arrays [n] of which entry i of both is the same episode.

    Under the null hypothesis each discordant pair is a fair coin, so the p-value is that of a two-sided binomial test
    of `gained` in `gained + lost` (McNemar 1947). Without discordant pairs nothing speaks against it: p = 1.
    """
    first, second = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    if first.shape != second.shape:
        raise ValueError(f"paired outcomes need equal shapes, got {first.shape} and {second.shape}")
    gained, lost = int(np.sum(~first & second)), int(np.sum(first & ~second))
    p = float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return PairedTest(gained=gained, lost=lost, n=len(first), p=p)


def compare(episodes: pd.DataFrame, before: str, after: str) -> PairedTest:
    """Pair two policies of an episode table by split, seed and plan index, and test them.

    A pair of which one side ended in an error is left out.

    Raises:
        UserError: the two policies did not run the same episodes.
    """
    paired = [episodes[episodes["policy"] == policy].set_index(EPISODE_KEY).sort_index() for policy in (before, after)]
    if not paired[0].index.equals(paired[1].index):
        raise UserError(
            f"episode table: policies {before!r} ({len(paired[0])} episodes) and {after!r} ({len(paired[1])}) ran "
            "different plan indices, expected the same; run `pi0rl evaluate` again"
        )
    whole = (paired[0]["error"].to_numpy(str) == "") & (paired[1]["error"].to_numpy(str) == "")
    return mcnemar(*(rows["success_once"].to_numpy(bool)[whole] for rows in paired))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p-values adjusted for testing all of them, float64 [n], by Holm's step-down method (Holm 1979).

    Rejecting those below alpha keeps the chance of even one false claim below alpha, whatever their dependence.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    factors = np.arange(len(p), 0, -1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1.0)
    return adjusted


def bootstrap_mean(
    counts: Mapping[str, np.ndarray], seed: int, resamples: int = 10_000, confidence: float = 0.95
) -> tuple[float, float]:
    """A percentile interval for the mean of suite success rates, by a hierarchical bootstrap over tasks and seeds.

    Each resample draws the seeds with replacement, in every suite as many tasks as it has with replacement, and in
    every drawn cell its episodes with replacement; the suites themselves are fixed. It covers the chance in the choice
    of tasks and seeds, which an interval over pooled episodes leaves out. With fewer than about five seeds it still
    understates what another seed would do.

    Args:
        counts: suite -> successes and episodes of every task under every seed, int [tasks, seeds, 2], each with at
            least one episode; the seeds are the same for all suites.
        seed: of the resampling; equal seeds give equal intervals.

    Returns:
        low and high in [0, 1].
    """
    rng = np.random.default_rng(seed)
    seeds = next(iter(counts.values())).shape[1]
    drawn_seeds = rng.integers(seeds, size=(resamples, 1, seeds))
    suite_means = np.empty((len(counts), resamples))
    for row, cells in enumerate(counts.values()):
        k, n = np.moveaxis(np.asarray(cells, dtype=np.int64), -1, 0)
        drawn = rng.integers(len(k), size=(resamples, len(k), 1)), drawn_seeds
        # Drawing n outcomes with replacement from k successes and n - k failures is one binomial draw.
        suite_means[row] = (rng.binomial(n[drawn], (k / n)[drawn]) / n[drawn]).mean(axis=(1, 2))
    tail = (1 - confidence) / 2
    low, high = np.quantile(suite_means.mean(axis=0), [tail, 1 - tail])
    return float(low), float(high)


def episodes_to_separate(gained: float, lost: float, power: float = 0.8, alpha: float = 0.05) -> int | None:
    """Paired episodes after which McNemar's test separates two policies with probability `power`.

    Args:
        gained, lost: share of episodes that only the second, only the first policy solves, each in [0, 1].
        power: probability of a p-value below `alpha`.

    Returns:
        The sample size of Connor (Biometrics 43, 1987), two-sided; None where the policies are equally good.
    """
    difference, discordant = gained - lost, gained + lost
    if difference == 0:
        return None
    z_alpha, z_power = stats.norm.ppf(1 - alpha / 2), stats.norm.ppf(power)
    spread = z_alpha * math.sqrt(discordant) + z_power * math.sqrt(max(discordant - difference**2, 0.0))
    return math.ceil((spread / difference) ** 2)
