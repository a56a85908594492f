"""Several runs in the form of the published table: SFT, PPO, GRPO x Spatial, Goal, Object, Long and their mean."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pi0rl.evaluation.statistics import bootstrap_mean
from pi0rl.report.tables import BOOTSTRAP_SEED, POLICY_LABELS, SUITE_LABELS

# suite -> training seed -> successes and episodes of every task, int [tasks, 2]
Counts = dict[str, dict[Hashable, np.ndarray]]

SFT_WEIGHTS = "sft/policy/model.safetensors"


@dataclass(frozen=True)
class Cell:
    """Success over seeds, tasks and episodes, with a 95 % hierarchical bootstrap over all three."""

    rate: float
    interval: tuple[float, float]
    k: int
    n: int


@dataclass(frozen=True)
class PublishedRow:
    """One line; a suite that was not played has no cell.

    Attributes:
        policy: sft, ppo or grpo.
        setting: what else was varied, empty where nothing was, or where it makes no difference to this policy.
        seeds: how many trainings stand behind every cell, at least.
        cells: suite -> its cell.
        mean: of the suites, each counted once, over the seeds that all of them have; None without such a seed.
    """

    policy: str
    setting: str
    seeds: int
    cells: dict[str, Cell]
    mean: Cell | None

    def cells_of(self, suites: Sequence[str]) -> list[Cell | None]:
        """Its cells in the order of ``suites``, and the mean."""
        return [*(self.cells.get(suite) for suite in suites), self.mean]


@dataclass(frozen=True)
class PublishedTable:
    """All rows, and the suites in the order of the columns."""

    suites: tuple[str, ...]
    rows: tuple[PublishedRow, ...]


def published_table(points: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], split: str) -> PublishedTable:
    """The table of one split.

    Args:
        points: coordinates (axis -> value, ``seed`` among them) and results (the content of results.json) of every run.
            All were judged under one protocol.
        split: official or held_out.
    """
    axes = [axis for axis in dict.fromkeys(axis for coordinates, _ in points for axis in coordinates) if axis != "seed"]
    told = [axis for axis in axes if not _shown_by_the_table(points, axis)]
    counts: dict[tuple[str, str], Counts] = {}
    starts: set[tuple[str, str, str]] = set()
    for coordinates, results in points:
        setting = ", ".join(f"{axis} {coordinates[axis]}" for axis in told if axis in coordinates)
        for policy, of_policy in _counts(results, split).items():
            for suite, tasks in of_policy.items():
                start = (setting, suite, results["checkpoints_sha256"][SFT_WEIGHTS])
                if policy == "sft":
                    if start in starts:
                        continue  # several seeds began from this one policy
                    starts.add(start)
                counts.setdefault((policy, setting), {}).setdefault(suite, {}).setdefault(
                    coordinates.get("seed", 0), tasks
                )
    rows = [_row(policy, setting, cells) for (policy, setting), cells in _without_repetition(counts).items()]
    order = [*POLICY_LABELS, *sorted({row.policy for row in rows} - set(POLICY_LABELS))]
    suites = {suite for row in rows for suite in row.cells}
    return PublishedTable(
        suites=(*(suite for suite in SUITE_LABELS if suite in suites), *sorted(suites - set(SUITE_LABELS))),
        rows=tuple(sorted(rows, key=lambda row: order.index(row.policy))),
    )


def _shown_by_the_table(points: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], axis: str) -> bool:
    """Whether an axis is told by the row's policy (PPO, GRPO) or by the column's suite, or never varies."""

    def tells(of: Callable[[Mapping[str, Any]], Hashable]) -> bool:
        seen: dict[str, set[Hashable]] = {}
        for coordinates, results in points:
            seen.setdefault(str(coordinates.get(axis)), set()).add(of(results))
        values = [value for found in seen.values() for value in found]
        return len(values) == len(seen) == len(set(values))

    one_value = len({str(coordinates.get(axis)) for coordinates, _ in points}) == 1
    policies = tells(lambda results: frozenset(row["policy"] for row in results["rows"]))
    return one_value or policies or tells(lambda results: frozenset(row["suite"] for row in results["rows"]))


def _counts(results: Mapping[str, Any], split: str) -> dict[str, dict[str, np.ndarray]]:
    """policy -> suite -> int [tasks, 2]."""
    counts: dict[str, dict[str, list[Sequence[int]]]] = {}
    for task in results["tasks"]:
        if task["split"] == split:
            for policy, cell in task["counts"].items():
                counts.setdefault(policy, {}).setdefault(task["suite"], []).append(cell)
    return {policy: {suite: np.array(of) for suite, of in suites.items()} for policy, suites in counts.items()}


def _without_repetition(counts: dict[tuple[str, str], Counts]) -> dict[tuple[str, str], Counts]:
    """The start that all settings share is one row: a policy with equal counts everywhere has no setting."""
    rows: dict[tuple[str, str], Counts] = {}
    for policy in dict.fromkeys(policy for policy, _ in counts):
        settings = {setting: of for (name, setting), of in counts.items() if name == policy}
        merged: Counts = {}
        equal = True
        for suite, seed, tasks in (cell for of in settings.values() for cell in _flat(of)):
            known = merged.setdefault(suite, {}).setdefault(seed, tasks)
            equal &= np.array_equal(known, tasks)
        rows |= {(policy, ""): merged} if equal else {(policy, setting): of for setting, of in settings.items()}
    return rows


def _flat(counts: Counts) -> Iterable[tuple[str, Hashable, np.ndarray]]:
    return ((suite, seed, tasks) for suite, seeds in counts.items() for seed, tasks in seeds.items())


def _row(policy: str, setting: str, counts: Counts) -> PublishedRow:
    stacked = {suite: np.stack(list(seeds.values()), axis=1) for suite, seeds in counts.items()}
    cells = {suite: _cell({suite: tasks}) for suite, tasks in stacked.items()}
    common = set.intersection(*(set(seeds) for seeds in counts.values()))
    shared = {
        suite: np.stack([tasks for seed, tasks in seeds.items() if seed in common], axis=1)
        for suite, seeds in counts.items()
        if common
    }
    return PublishedRow(policy, setting, min(map(len, counts.values())), cells, _cell(shared) if shared else None)


def _cell(counts: dict[str, np.ndarray]) -> Cell:
    totals = {suite: cells.sum(axis=(0, 1)) for suite, cells in counts.items()}
    return Cell(
        rate=float(np.mean([k / n for k, n in totals.values()])),
        interval=bootstrap_mean(counts, seed=BOOTSTRAP_SEED),
        k=int(sum(k for k, _ in totals.values())),
        n=int(sum(n for _, n in totals.values())),
    )
