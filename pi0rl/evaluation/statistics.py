"""What may be concluded from an episode table: counts, intervals, paired tests.

Every number of a report comes from the episode table (:mod:`pi0rl.evaluation.table`). An episode has three outcomes:
success, failure, error. An error is neither success nor failure: it is counted apart and takes no part in a rate.

Played under several seeds, the episodes that begin in one init state are no independent samples: they are a cluster.
With one seed every cluster is one episode, and what follows are Wilson's interval and McNemar's exact test.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import pandas as pd
from scipy import stats

from pi0rl.errors import UserError

# What names an episode within a policy's rows: two policies are paired by it.
EPISODE_KEY = ["split", "seed", "index"]
# What names the init state it begins in, whatever the seed of the policy's noise.
STATE_KEY = ["split", "index"]
_ROUNDING = 1e-12


@dataclass(frozen=True)
class PairedTest:
    """Two policies on the same episodes.

    Attributes:
        gained: episodes that only the second policy solved.
        lost: episodes that only the first policy solved.
        n: pairs in all.
        p: two-sided p-value of the exact McNemar test over init states, in (0, 1].
    """

    gained: int
    lost: int
    n: int
    p: float


def wilson_interval(k: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a success rate with `k` successes in `n` > 0 episodes (Wilson 1927), in [0, 1].

    Neither need be whole: clustered episodes are worth fewer independent ones.
    """
    z2 = float(stats.norm.ppf((1 + confidence) / 2)) ** 2
    rate = k / n
    centre = rate + z2 / (2 * n)
    spread = math.sqrt(z2 * (rate * (1 - rate) + z2 / (4 * n)) / n)
    low, high = (centre - spread) / (1 + z2 / n), (centre + spread) / (1 + z2 / n)
    return (low if rate > _ROUNDING else 0.0), (high if rate < 1 - _ROUNDING else 1.0)  # what the limits come to


def independent_episodes(k: np.ndarray, n: np.ndarray) -> float:
    """How many independent episodes tell as much of the success rate as clustered ones (Kish's effective sample size).

    Args:
        k, n: successes and episodes (at least one) of every init state, int [states].

    Returns:
        Between the number of states, where all episodes of a state end alike, and the number of episodes, which is the
        result for one episode per state. Where all episodes of all states end alike, nothing tells how alike those of
        one state are, and the number of states is taken.
    """
    states, episodes = len(n), int(n.sum())
    rate = k.sum() / episodes
    if episodes == states or rate in (0.0, 1.0):
        return float(states)
    of_clusters = float(((k - rate * n) ** 2).sum()) / episodes**2
    of_episodes = rate * (1 - rate) / episodes
    return float(np.clip(episodes * of_episodes / of_clusters, states, episodes)) if of_clusters else float(episodes)


def mcnemar(
    before: Sequence[bool] | np.ndarray, after: Sequence[bool] | np.ndarray, states: np.ndarray | None = None
) -> PairedTest:
    """The exact McNemar test of two success arrays [n] of which entry i of both is the same episode.

    Under the null hypothesis each discordant pair is a fair coin, so the p-value is that of a two-sided binomial test
    of `gained` in `gained + lost` (McNemar 1947). Without discordant pairs nothing speaks against it: p = 1.

    Args:
        before, after: success of either policy, bool [n].
        states: int [n], which init state each pair began in; by default another one each. Pairs of one state share a
            coin: it decides the sign of what was gained there minus what was lost (an exact sign-flip test).
    """
    first, second = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    if first.shape != second.shape:
        raise ValueError(f"paired outcomes need equal shapes, got {first.shape} and {second.shape}")
    gained, lost = int(np.sum(~first & second)), int(np.sum(first & ~second))
    differences = second.astype(np.int64) - first
    if states is not None:
        _, cluster = np.unique(states, return_inverse=True)
        differences = np.bincount(cluster, weights=differences).round().astype(np.int64)
    return PairedTest(gained=gained, lost=lost, n=len(first), p=_sign_flip_p(differences))


def _sign_flip_p(differences: np.ndarray) -> float:
    """Two-sided p-value of the sum of integers [n] if each had either sign with probability 1/2, without sampling."""
    sizes = np.abs(differences[differences != 0])
    # Of c differences of size v, b positive ones add v (2 b - c): in steps of 2 v, with binomial chances.
    sums = []
    for size, count in zip(*np.unique(sizes, return_counts=True), strict=True):
        chances = np.zeros(2 * size * count + 1)
        chances[:: 2 * size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        sums.append(chances)
    chances = reduce(np.convolve, sums, np.ones(1))
    total = sizes.sum()
    extreme = np.abs(np.arange(-total, total + 1)) >= abs(differences.sum())
    return min(1.0, float(chances[extreme].sum()))


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
    states = paired[0].reset_index().groupby(STATE_KEY).ngroup().to_numpy()
    first, second = (rows["success_once"].to_numpy(bool)[whole] for rows in paired)
    return mcnemar(first, second, states[whole])


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
    """An interval for the mean of suite success rates, by a hierarchical bootstrap over tasks and seeds.

    Each resample draws the seeds with replacement, in every suite as many tasks as it has with replacement, and in
    every drawn cell its episodes with replacement; the suites themselves are fixed. It covers the chance in the choice
    of tasks and seeds, which an interval over pooled episodes leaves out. With fewer than about five seeds it still
    understates what another seed would do.

    Resampling knows no outcome but those it has seen: of nothing but failures it makes an interval without width. So
    the percentiles are widened to at least Wilson's interval of the mean, with as many episodes as one seed played:
    further seeds play from the same init states.

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
    floor = _wilson_of_mean(counts, confidence)
    return min(float(low), floor[0]), max(float(high), floor[1])


def _wilson_of_mean(counts: Mapping[str, np.ndarray], confidence: float) -> tuple[float, float]:
    """Wilson's interval of the mean of suite success rates, from what one seed played."""
    totals = [np.asarray(cells, dtype=np.float64).sum(axis=(0, 1)) for cells in counts.values()]
    seeds = next(iter(counts.values())).shape[1]
    rate = float(np.mean([k / n for k, n in totals]))
    # A mean of rates varies as one rate over this many episodes: all of them where the suites have equally many.
    episodes = len(totals) ** 2 / sum(seeds / n for _, n in totals)
    return wilson_interval(rate * episodes, episodes, confidence)


def episodes_to_separate(gained: float, lost: float, power: float = 0.8, alpha: float = 0.05) -> int | None:
    """Paired episodes, each from another init state, after which the exact McNemar test separates two policies.

    Args:
        gained, lost: share of episodes that only the second, only the first policy solves, each in [0, 1].
        power: probability of a p-value below `alpha`.

    Returns:
        From the asymptotic sample size of Connor (Biometrics 43, 1987) upwards, the first that has this power; beyond
        500 to half a per cent. None where the policies are equally good.
    """
    difference, discordant = gained - lost, gained + lost
    if difference == 0:
        return None
    z_alpha, z_power = stats.norm.ppf(1 - alpha / 2), stats.norm.ppf(power)
    spread = z_alpha * math.sqrt(discordant) + z_power * math.sqrt(max(discordant - difference**2, 0.0))
    n = math.ceil((spread / difference) ** 2)
    while mcnemar_power(n, gained, lost, alpha) < power:
        n += max(1, n // 200)
    return n


def mcnemar_power(n: int, gained: float, lost: float, alpha: float = 0.05) -> float:
    """Probability that the exact McNemar test of `n` pairs gives a two-sided p-value below `alpha`.

    Args:
        gained, lost: as in `episodes_to_separate`; their sum is above 0.
    """
    discordant = min(gained + lost, 1.0)
    # So many pairs differ, but for a chance of 1e-12
    low, high = stats.binom.ppf([5e-13, 1 - 5e-13], n, discordant)
    pairs = np.arange(low, high + 1)
    few = stats.binom.ppf(alpha / 2, pairs, 0.5) - 1  # the most of the rarer kind with which it is rejected; -1: never
    share = gained / (gained + lost)
    rejected = stats.binom.cdf(few, pairs, share) + stats.binom.sf(pairs - few - 1, pairs, share)
    return float((stats.binom.pmf(pairs, n, discordant) * rejected).sum())
