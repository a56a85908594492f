"""From an episode table to the numbers of a report: rates, intervals, paired tests, tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from pi0rl.evaluation.protocols import Protocol
from pi0rl.evaluation.statistics import (
    STATE_KEY,
    bootstrap_mean,
    compare,
    episodes_to_separate,
    holm,
    independent_episodes,
    wilson_interval,
)

POLICY_LABELS = {"sft": "SFT", "ppo": "PPO", "grpo": "GRPO"}
SUITE_LABELS = {  # in the order of the published table
    "libero_spatial": "Spatial",
    "libero_goal": "Goal",
    "libero_object": "Object",
    "libero_10": "Long",
    "libero_90": "90",
}
SPLIT_LABELS = {"held_out": "held-out init states", "official": "official init states"}
FAILURE_KINDS: dict[str, str] = {
    "never grasped": "no object of the goal was ever lifted",
    "wrong object": "only an object that the goal is not about was lifted",
    "dropped": "an object of the goal was lifted, and let go elsewhere",
    "timeout": "the time was up with the object in the gripper, or with a door, drawer or knob left to move",
}
ALL_SUITES = "all"
RATES_NOTE = (
    "Suites: 95 % Wilson interval over episodes, those from one init state under several seeds counted together. Mean: "
    "95 % hierarchical bootstrap over tasks, seeds and episodes, never narrower than Wilson's."
)
BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class SuiteResult:
    """`k` of `n` episodes of a suite were a success at some step (`k_at_end`: still one at the last step).

    `wilson`: 95 % interval of the rate, in which the episodes of one init state count as a cluster. `errors` more ended
    without an outcome. `failures`: kind -> episodes.
    """

    policy: str
    split: str
    suite: str
    k: int
    n: int
    wilson: tuple[float, float]
    k_at_end: int
    errors: int
    failures: dict[str, int]

    @property
    def rate(self) -> float:
        return self.k / self.n


@dataclass(frozen=True)
class MeanResult:
    """Mean of a policy's suite success rates, with the interval of a bootstrap over tasks, seeds and episodes."""

    policy: str
    split: str
    rate: float
    bootstrap: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """A policy against the one it started from, on the same episodes of one suite or of ``all``.

    Attributes:
        change: difference of the success rates over these episodes, in [-1, 1]; of ``all``, that of the means over
            suites.
        gained, lost, mcnemar_p: see `pi0rl.evaluation.statistics.PairedTest`.
        holm_p: mcnemar_p adjusted for all comparisons of the report of its kind: those of single suites, or of ``all``.
        episodes_needed: paired episodes, each from another init state, that would show this difference with 80 % power
            at p < 0.05 before Holm's correction; None where there is none.
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
    holm_p: float
    episodes_needed: int | None

    @property
    def regression(self) -> bool:
        return self.change < 0

    @property
    def verdict(self) -> str:
        """What the corrected p-value says, at the usual 5 %."""
        return "unlikely to be chance" if self.holm_p < 0.05 else "may be chance"


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
    def judged(self) -> str:
        """The policy that the report is about: the first trained one, or the only one."""
        return self.policies[1] if self.trained else self.policies[0]

    @property
    def errors(self) -> int:
        """Episodes without an outcome, over everything."""
        return sum(row.errors for row in self.rows)

    def failures(self, policy: str) -> dict[str, int]:
        """Kind of failure -> episodes of a policy, over all splits and suites."""
        total: Counter[str] = Counter()
        for row in self.rows:
            if row.policy == policy:
                total.update(row.failures)
        return {kind: total[kind] for kind in FAILURE_KINDS if total[kind]}

    def episodes(self, policy: str) -> int:
        """Episodes of a policy that have an outcome."""
        return sum(row.n for row in self.rows if row.policy == policy)

    @property
    def regressions(self) -> tuple[Comparison, ...]:
        return tuple(c for c in self.comparisons if c.regression and c.suite != ALL_SUITES)


def summarise(episodes: pd.DataFrame, policies: tuple[str, ...] | None = None) -> Summary:
    """All numbers of a complete episode table (see `require_complete`).

    Args:
        policies: those of the table, the one first that the others are compared with; by default the known ones first.
    """
    policies = policies or ordered_policies(episodes)
    splits = _ordered(episodes["split"].unique().tolist(), SPLIT_LABELS)
    suites = _ordered(episodes["suite"].unique().tolist(), SUITE_LABELS)
    tasks = tuple(task for split in splits for suite in suites for task in _tasks(episodes, policies, split, suite))
    keys = [(policy, split) for split in splits for policy in policies]
    rows = tuple(_suite_result(episodes, policy, split, suite) for policy, split in keys for suite in suites)
    means = tuple(_mean_result(episodes, rows, policy, split) for policy, split in keys)
    rates = {(mean.policy, mean.split): mean.rate for mean in means}
    comparisons = []
    for split in splits:
        for after in policies[1:]:
            comparisons += [_comparison(episodes, policies[0], after, split, suite) for suite in suites]
            of_all = _comparison(episodes, policies[0], after, split, ALL_SUITES)
            change = round(rates[after, split] - rates[policies[0], split], 12)  # equal means are no regression
            comparisons.append(replace(of_all, change=change))
    return Summary(
        policies=policies,
        splits=splits,
        suites=suites,
        rows=rows,
        means=means,
        comparisons=_adjusted(comparisons),
        tasks=tasks,
    )


def ordered_policies(episodes: pd.DataFrame) -> tuple[str, ...]:
    """The policies of a table, the one that the others started from first."""
    return _ordered(episodes["policy"].unique().tolist(), POLICY_LABELS)


def _ordered(values: list[str], known: dict[str, str]) -> tuple[str, ...]:
    return (*(name for name in known if name in values), *sorted(set(values) - set(known)))


def _select(episodes: pd.DataFrame, **columns: str | int) -> pd.DataFrame:
    chosen = episodes
    for column, value in columns.items():
        chosen = chosen.loc[chosen[column] == value]
    return chosen


def _suite_result(episodes: pd.DataFrame, policy: str, split: str, suite: str) -> SuiteResult:
    chosen = _select(episodes, policy=policy, split=split, suite=suite)
    judged = _judged(chosen)
    k, n = int(judged["success_once"].to_numpy(bool).sum()), len(judged)
    states = judged.groupby(STATE_KEY)["success_once"].agg(["sum", "count"]).to_numpy(np.int64)
    independent = independent_episodes(*states.T)
    return SuiteResult(
        policy=policy,
        split=split,
        suite=suite,
        k=k,
        n=n,
        wilson=wilson_interval(k * (independent / n), independent),
        k_at_end=int(judged["success_at_end"].to_numpy(bool).sum()),
        errors=len(chosen) - n,
        failures=dict(sorted(Counter(judged["failure"][judged["failure"] != ""].tolist()).items())),
    )


def _judged(episodes: pd.DataFrame) -> pd.DataFrame:
    """The episodes that have an outcome."""
    return episodes.loc[episodes["error"] == ""]


def _mean_result(episodes: pd.DataFrame, rows: tuple[SuiteResult, ...], policy: str, split: str) -> MeanResult:
    chosen = _judged(_select(episodes, policy=policy, split=split))
    rates = [row.rate for row in rows if (row.policy, row.split) == (policy, split)]
    cells = {str(suite): success_counts(of_suite) for suite, of_suite in chosen.groupby("suite", sort=True)}
    return MeanResult(policy, split, sum(rates) / len(rates), bootstrap_mean(cells, seed=BOOTSTRAP_SEED))


def success_counts(episodes: pd.DataFrame) -> np.ndarray:
    """Successes and episodes of every task under every seed, int [tasks, seeds, 2]."""
    cells = episodes.groupby(["task_id", "seed"], sort=True)["success_once"].agg(["sum", "count"])
    tasks, seeds = (cells.index.unique(level) for level in ("task_id", "seed"))
    return cells.to_numpy(np.int64).reshape(len(tasks), len(seeds), 2)


def _adjusted(comparisons: Sequence[Comparison]) -> tuple[Comparison, ...]:
    """The comparisons with Holm's correction, over those of single suites and over those of all suites."""
    families = ([c for c in comparisons if (c.suite == ALL_SUITES) is of_all] for of_all in (False, True))
    adjusted = {
        (c.split, c.after, c.suite): p
        for family in families
        for c, p in zip(family, holm([c.mcnemar_p for c in family]).tolist(), strict=True)
    }
    return tuple(replace(c, holm_p=adjusted[c.split, c.after, c.suite]) for c in comparisons)


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
        holm_p=test.p,
        episodes_needed=episodes_to_separate(test.gained / test.n, test.lost / test.n),
    )


def _tasks(episodes: pd.DataFrame, policies: tuple[str, ...], split: str, suite: str) -> list[TaskResult]:
    chosen = _judged(_select(episodes, split=split, suite=suite))
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


def result_lines(summary: Summary, protocol: Protocol) -> list[str]:
    """The success rates as a Markdown table, a row per policy and split, and what they hold under."""
    lines = [
        "| Policy | Init states | " + " | ".join(map(suite_label, summary.suites)) + " | Mean |",
        "|---|---|" + "---|" * (len(summary.suites) + 1),
    ]
    for split in summary.splits:
        for policy in summary.policies:
            cells = [suite_cell(summary.row(policy, split, suite)) for suite in summary.suites]
            mean = summary.mean(policy, split)
            cells.append(f"{percent(mean.rate)} {interval(mean.bootstrap)}")
            lines.append("| " + " | ".join([POLICY_LABELS.get(policy, policy), SPLIT_LABELS[split], *cells]) + " |")
    lines += ["", f"Success at any step. Protocol {protocol.name} ({protocol.hash}). {RATES_NOTE}"]
    if summary.errors:
        lines[-1] += f" {counted(summary.errors, 'episode')} ended in an error, counted in no rate."
    return lines


def comparison_lines(summary: Summary) -> list[str]:
    """Every policy against the first one on the same episodes, as a Markdown table; nothing for a single policy."""
    if not summary.trained:
        return []
    base = POLICY_LABELS.get(summary.policies[0], summary.policies[0])
    lines = [
        f"| Against {base} | Init states | Suite | Points | Gained | Lost | McNemar p | Holm | Episodes needed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for c in summary.comparisons:
        change = points(c.change) + (" (worse)" if c.regression else "")
        needed = f"{c.episodes_needed:,}" if c.episodes_needed else "–"
        cells = [POLICY_LABELS.get(c.after, c.after), SPLIT_LABELS[c.split], suite_label(c.suite), change]
        cells += [str(c.gained), str(c.lost), p_value(c.mcnemar_p), p_value(c.holm_p), needed]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", comparison_note(base)]


def comparison_note(base: str) -> str:
    """What the columns of a paired comparison with the policy called ``base`` mean."""
    return (
        f"Gained: only the later policy solves the episode; lost: only {base} does. McNemar p: exact; episodes from "
        "one init state under several seeds count together. Holm: that p adjusted for all rows of single suites, or "
        "for all rows of all suites. Episodes needed: paired episodes, each from another init state, that show such a "
        "difference with 80 % power at p < 0.05 before Holm's correction."
    )


def counted(number: int, noun: str) -> str:
    """1, 'error' -> '1 error'; 1200 -> '1,200 errors'."""
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


def suite_label(suite: str) -> str:
    """``libero_10`` -> ``Long``, ``libero_object_swap`` -> ``Object, swap``."""
    base = max((name for name in SUITE_LABELS if suite.startswith(name)), key=len, default=suite)
    perturbation = suite.removeprefix(base).replace("_", " ")
    return SUITE_LABELS.get(base, base) + (f",{perturbation}" if perturbation else "")


def suite_cell(row: SuiteResult) -> str:
    """``84.0 % (168/200) [78.3 %, 88.4 %]``."""
    at_end = "" if row.k_at_end == row.k else f", {row.k_at_end} at the end"
    errors = f", {counted(row.errors, 'error')}" if row.errors else ""
    return f"{percent(row.rate)} ({row.k}/{row.n}{at_end}{errors}) {interval(row.wilson)}"


def percent(rate: float) -> str:
    """0.834 -> '83.4 %'."""
    return f"{100 * rate:.1f} %"


def interval(bounds: tuple[float, float]) -> str:
    """(0.783, 0.884) -> '[78.3 %, 88.4 %]'."""
    low, high = bounds
    return f"[{percent(low)}, {percent(high)}]"


def points(change: float) -> str:
    """0.28 -> '+28.0'; a true minus sign for a loss, and no sign for none."""
    return f"{100 * change:+.1f}".replace("-", "−") if change else "0"


def p_value(p: float) -> str:
    """0.0312 -> '0.031', 8.1e-7 -> '8.1e-07'."""
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"
