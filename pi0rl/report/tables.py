"""From an episode table to the numbers of a report: rates, intervals, paired tests, tasks."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from pi0rl.evaluation.statistics import bootstrap_mean, compare, episodes_to_separate, wilson_interval

POLICY_LABELS = {"sft": "SFT", "ppo": "PPO", "grpo": "GRPO"}
SUITE_LABELS = {  # in the order of the published table
    "libero_spatial": "Spatial",
    "libero_goal": "Goal",
    "libero_object": "Object",
    "libero_10": "Long",
    "libero_90": "90",
}
SPLIT_LABELS = {"held_out": "held-out init states", "official": "official init states"}
ALL_SUITES = "all"
BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class SuiteResult:
    """`k` of `n` episodes of a suite were a success at some step (`k_at_end`: still one at the last step)."""

    policy: str
    split: str
    suite: str
    k: int
    n: int
    wilson: tuple[float, float]
    k_at_end: int

    @property
    def rate(self) -> float:
        return self.k / self.n


@dataclass(frozen=True)
class MeanResult:
    """Mean of a policy's suite success rates, with the interval of a bootstrap over tasks and episodes."""

    policy: str
    split: str
    rate: float
    bootstrap: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """A policy against the one it started from, on the same episodes of one suite or of ``all``.

    Attributes:
        change: difference of the success rates over these episodes, in [-1, 1].
        gained, lost, mcnemar_p: see `pi0rl.evaluation.statistics.PairedTest`.
        episodes_needed: paired episodes that would show this difference with 80 % power; None where there is none.
    """

    before: str
    after: str
    split: str
    suite: str
    change: float
    gained: int
    lost: int
    n: int
    mcnemar_p: float
    episodes_needed: int | None

    @property
    def regression(self) -> bool:
        return self.change < 0


@dataclass(frozen=True)
class TaskResult:
    """Successes of every policy on one task: policy -> (k, n)."""

    split: str
    suite: str
    task_id: int
    task: str
    language: str
    counts: dict[str, tuple[int, int]]

    def rate(self, policy: str) -> float:
        k, n = self.counts[policy]
        return k / n


@dataclass(frozen=True)
class Summary:
    """All numbers of a report. Policies, splits and suites are in the order in which they are shown."""

    policies: tuple[str, ...]
    splits: tuple[str, ...]
    suites: tuple[str, ...]
    rows: tuple[SuiteResult, ...]
    means: tuple[MeanResult, ...]
    comparisons: tuple[Comparison, ...]
    tasks: tuple[TaskResult, ...]

    def row(self, policy: str, split: str, suite: str) -> SuiteResult:
        return next(r for r in self.rows if (r.policy, r.split, r.suite) == (policy, split, suite))

    def mean(self, policy: str, split: str) -> MeanResult:
        return next(m for m in self.means if (m.policy, m.split) == (policy, split))

    def comparison(self, after: str, split: str, suite: str) -> Comparison:
        return next(c for c in self.comparisons if (c.after, c.split, c.suite) == (after, split, suite))

    def comparisons_of(self, split: str) -> tuple[Comparison, ...]:
        return tuple(comparison for comparison in self.comparisons if comparison.split == split)

    def tasks_of(self, split: str) -> tuple[TaskResult, ...]:
        return tuple(task for task in self.tasks if task.split == split)

    @property
    def trained(self) -> tuple[str, ...]:
        """The policies that are compared with the first one."""
        return self.policies[1:]

    @property
    def headline(self) -> Comparison | None:
        """First trained policy against the start, over all suites, on held-out states if there are any."""
        return self.comparison(self.policies[1], self.splits[0], ALL_SUITES) if self.trained else None

    @property
    def regressions(self) -> tuple[Comparison, ...]:
        return tuple(c for c in self.comparisons if c.regression and c.suite != ALL_SUITES)


def summarise(episodes: pd.DataFrame) -> Summary:
    """All numbers of a complete episode table (see `require_complete`)."""
    policies = _ordered(episodes["policy"].unique().tolist(), POLICY_LABELS)
    splits = _ordered(episodes["split"].unique().tolist(), SPLIT_LABELS)
    suites = _ordered(episodes["suite"].unique().tolist(), SUITE_LABELS)
    tasks = tuple(task for split in splits for suite in suites for task in _tasks(episodes, policies, split, suite))
    keys = [(policy, split) for split in splits for policy in policies]
    rows = tuple(_suite_result(episodes, policy, split, suite) for policy, split in keys for suite in suites)
    return Summary(
        policies=policies,
        splits=splits,
        suites=suites,
        rows=rows,
        means=tuple(_mean_result(rows, tasks, policy, split) for policy, split in keys),
        comparisons=tuple(
            _comparison(episodes, policies[0], after, split, suite)
            for split in splits
            for after in policies[1:]
            for suite in (*suites, ALL_SUITES)
        ),
        tasks=tasks,
    )


def _ordered(values: list[str], known: dict[str, str]) -> tuple[str, ...]:
    return (*(name for name in known if name in values), *sorted(set(values) - set(known)))


def _select(episodes: pd.DataFrame, **columns: str | int) -> pd.DataFrame:
    chosen = episodes
    for column, value in columns.items():
        chosen = chosen.loc[chosen[column] == value]
    return chosen


def _suite_result(episodes: pd.DataFrame, policy: str, split: str, suite: str) -> SuiteResult:
    chosen = _select(episodes, policy=policy, split=split, suite=suite)
    k, n = int(chosen["success_once"].to_numpy(bool).sum()), len(chosen)
    return SuiteResult(
        policy, split, suite, k, n, wilson_interval(k, n), int(chosen["success_at_end"].to_numpy(bool).sum())
    )


def _mean_result(rows: tuple[SuiteResult, ...], tasks: tuple[TaskResult, ...], policy: str, split: str) -> MeanResult:
    rates = [row.rate for row in rows if (row.policy, row.split) == (policy, split)]
    successes: dict[str, list[tuple[int, int]]] = {}
    for task in tasks:
        if task.split == split:
            successes.setdefault(task.suite, []).append(task.counts[policy])
    return MeanResult(policy, split, sum(rates) / len(rates), bootstrap_mean(successes, seed=BOOTSTRAP_SEED))


def _comparison(episodes: pd.DataFrame, before: str, after: str, split: str, suite: str) -> Comparison:
    chosen = _select(episodes, split=split)
    chosen = chosen if suite == ALL_SUITES else _select(chosen, suite=suite)
    test = compare(chosen, before, after)
    return Comparison(
        before=before,
        after=after,
        split=split,
        suite=suite,
        change=(test.gained - test.lost) / test.n,
        gained=test.gained,
        lost=test.lost,
        n=test.n,
        mcnemar_p=test.p,
        episodes_needed=episodes_to_separate(test.gained / test.n, test.lost / test.n),
    )


def _tasks(episodes: pd.DataFrame, policies: tuple[str, ...], split: str, suite: str) -> list[TaskResult]:
    chosen = _select(episodes, split=split, suite=suite)
    tasks = []
    for task_id in sorted(chosen["task_id"].unique().tolist()):
        rows = _select(chosen, task_id=task_id)
        successes = {policy: _select(rows, policy=policy)["success_once"].to_numpy(bool) for policy in policies}
        tasks.append(
            TaskResult(
                split=split,
                suite=suite,
                task_id=int(task_id),
                task=str(rows["task"].iloc[0]),
                language=str(rows["language"].iloc[0]),
                counts={policy: (int(s.sum()), len(s)) for policy, s in successes.items()},
            )
        )
    return tasks
