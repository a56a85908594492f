"""What may be concluded from an episode table: counts, intervals, paired tests.

Every number of a report comes from the table of `EPISODE_COLUMNS`, one row per episode and policy. An episode has three
outcomes: success, failure, error. An error is no failure, so a table that holds one supports no conclusion and
`require_complete` refuses it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from pi0rl.errors import UserError

EPISODE_COLUMNS: tuple[str, ...] = (
    "policy",
    "split",
    "index",
    "suite",
    "task_id",
    "task",
    "language",
    "init_state_id",
    "state_hash",
    "seed",
    "success_once",
    "success_at_end",
    "steps",
    "error",
    "video",
)


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
    """Pair two policies of an episode table by (split, plan index) and test them.

    Raises:
        UserError: the two policies did not run the same episodes.
    """
    keys = ["split", "index"]
    paired = [episodes[episodes["policy"] == policy].set_index(keys).sort_index() for policy in (before, after)]
    if not paired[0].index.equals(paired[1].index):
        raise UserError(
            f"episode table: policies {before!r} ({len(paired[0])} episodes) and {after!r} ({len(paired[1])}) ran "
            "different plan indices, expected the same; run `pi0rl evaluate` again"
        )
    return mcnemar(paired[0]["success_once"].to_numpy(bool), paired[1]["success_once"].to_numpy(bool))


def bootstrap_mean(
    successes: Mapping[str, Sequence[tuple[int, int]]], seed: int, resamples: int = 10_000, confidence: float = 0.95
) -> tuple[float, float]:
    """A percentile interval for the mean of suite success rates, by a hierarchical bootstrap.

    Each resample draws, in every suite, as many tasks as it has with replacement, and in every drawn task its
    episodes with replacement; the suites themselves are fixed. It covers the chance in the choice of tasks, which an
    interval over pooled episodes leaves out.

    Args:
        successes: suite -> one (k, n) per task, n >= 1.
        seed: of the resampling; equal seeds give equal intervals.

    Returns:
        low and high in [0, 1].
    """
    rng = np.random.default_rng(seed)
    suite_means = np.empty((len(successes), resamples))
    for row, tasks in enumerate(successes.values()):
        k, n = np.asarray(tasks, dtype=np.int64).T
        drawn = rng.integers(len(k), size=(resamples, len(k)))
        # Drawing n outcomes with replacement from k successes and n - k failures is one binomial draw.
        suite_means[row] = (rng.binomial(n[drawn], k[drawn] / n[drawn]) / n[drawn]).mean(axis=1)
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


def require_complete(episodes: pd.DataFrame, planned: Mapping[str, int], source: str = "episode table") -> None:
    """Refuse a table from which no conclusion may be drawn.

    Args:
        planned: split -> number of episodes in its plan; the plan's indices are 0 .. number - 1.
        source: what to call the table in the message.

    Raises:
        UserError: a column is missing, or a policy's episodes are not the planned ones, each once, without error, from
            the same init states as the other policies'.
    """
    missing = [column for column in EPISODE_COLUMNS if column not in episodes]
    if missing:
        raise UserError(f"{source}: no column {missing[0]!r}, expected {', '.join(EPISODE_COLUMNS)}")
    if episodes.empty:
        raise UserError(f"{source}: no episodes, expected at least one; run `pi0rl evaluate` again")
    _require_no_errors(episodes, source)
    for _, rows in episodes.groupby(["policy", "split"], sort=True):
        policy, split = rows["policy"].iloc[0], rows["split"].iloc[0]
        if split not in planned:
            expected = " or ".join(sorted(planned))
            raise UserError(f"{source}: {policy!r} has episodes of split {split!r}, expected {expected}")
        _require_planned(rows, planned[split], f"{source}: {policy!r} on split {split!r}")
    _require_same_episodes(episodes, sorted(planned), source)


def _require_no_errors(episodes: pd.DataFrame, source: str) -> None:
    failed = episodes[episodes["error"].fillna("") != ""]
    if len(failed):
        first = failed.iloc[0]
        raise UserError(
            f"{source}: {len(failed)} of {len(episodes)} episodes ended in an error, expected none (first: "
            f"{first['policy']!r}, {first['suite']} task {first['task_id']}, index {first['index']}: "
            f"{_one_line(first['error'])}); run `pi0rl evaluate` again, it repeats them"
        )


def _require_planned(rows: pd.DataFrame, planned: int, where: str) -> None:
    indices = rows["index"].to_numpy()
    if len(np.unique(indices)) != len(indices):
        raise UserError(
            f"{where}: {len(indices)} episodes hold a plan index twice, expected each once; delete the table"
        )
    if len(indices) != planned or indices.min() != 0 or indices.max() != planned - 1:
        absent = sorted(set(range(planned)) - set(indices.tolist()))
        example = f", first missing index {absent[0]}" if absent else ""
        raise UserError(f"{where}: {len(indices)} episodes completed, {planned} planned{example}; run `pi0rl evaluate`")


def _require_same_episodes(episodes: pd.DataFrame, splits: Sequence[str], source: str) -> None:
    policies = episodes["policy"].unique()
    for split in splits:
        rows = episodes[episodes["split"] == split]
        absent = sorted(set(policies) - set(rows["policy"]))
        if absent:
            raise UserError(
                f"{source}: {absent[0]!r} has no episodes of split {split!r}, expected every policy to run it"
            )
        identity = ["suite", "task_id", "init_state_id", "state_hash", "seed"]
        differing = [index for index, same in rows.groupby("index")[identity] if len(same.drop_duplicates()) > 1]
        if differing:
            raise UserError(
                f"{source}: plan index {differing[0]} of split {split!r} is not the same episode for every policy, "
                f"expected equal {', '.join(identity)}; delete the table and run `pi0rl evaluate` again"
            )


def _one_line(text: str, limit: int = 120) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
