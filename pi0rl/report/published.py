"""Several runs in the form of the published table: SFT, PPO, GRPO x Spatial, Goal, Object, Long and their mean."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pi0rl.evaluation.statistics import bootstrap_mean
from pi0rl.report.tables import BOOTSTRAP_SEED, POLICY_LABELS, SUITE_LABELS

SFT_WEIGHTS = "sft/policy/model.safetensors"


@dataclass(frozen=True)
class Played:
    """What one training's policy made of a suite: int [tasks, 2], and how many more episodes had no outcome."""

    tasks: np.ndarray
    errors: int


# suite -> training seed -> what was played
Counts = dict[str, dict[Hashable, Played]]


@dataclass(frozen=True)
class Cell:
    """Success over seeds, tasks and episodes, with a 95 % hierarchical bootstrap over all three.

    ``errors`` more episodes ended without an outcome.
    """

    rate: float
    interval: tuple[float, float]
    k: int
    n: int
    errors: int


@dataclass(frozen=True)
class PublishedRow:
    """One line; a suite that was not played has no cell.

    Attributes:
        policy: sft, ppo or grpo.
        setting: what else was varied, empty where nothing was, or where it makes no difference to this policy.
        seeds: how many trainings stand behind every cell, at least.
        cells: suite -> its cell.
        mean: of the table's suites, each counted once, over the seeds that all of them have; None where a suite was not
            played, or no seed played them all: means of different suites would stand in one column.
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
        for policy, of_policy in _played(results, split).items():
            for suite, played in of_policy.items():
                start = (setting, suite, results["checkpoints_sha256"][SFT_WEIGHTS])
                if policy == "sft":
                    if start in starts:
                        continue  # several seeds began from this one policy
                    starts.add(start)
                counts.setdefault((policy, setting), {}).setdefault(suite, {}).setdefault(
                    coordinates.get("seed", 0), played
                )
    found = {suite for cells in counts.values() for suite in cells}
    suites = (*(suite for suite in SUITE_LABELS if suite in found), *sorted(found - set(SUITE_LABELS)))
    rows = [_row(policy, setting, cells, suites) for (policy, setting), cells in _without_repetition(counts).items()]
    order = [*POLICY_LABELS, *sorted({row.policy for row in rows} - set(POLICY_LABELS))]
    return PublishedTable(suites, tuple(sorted(rows, key=lambda row: order.index(row.policy))))


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


def _played(results: Mapping[str, Any], split: str) -> dict[str, dict[str, Played]]:
    """policy -> suite -> what was played."""
    errors = {(row["policy"], row["split"], row["suite"]): row["errors"] for row in results["rows"]}
    counts: dict[str, dict[str, list[Sequence[int]]]] = {}
    for task in results["tasks"]:
        if task["split"] == split:
            for policy, cell in task["counts"].items():
                counts.setdefault(policy, {}).setdefault(task["suite"], []).append(cell)
    return {
        policy: {suite: Played(np.array(of), errors[policy, split, suite]) for suite, of in suites.items()}
        for policy, suites in counts.items()
    }


def _without_repetition(counts: dict[tuple[str, str], Counts]) -> dict[tuple[str, str], Counts]:
    """The start that all settings share is one row: a policy with equal counts everywhere has no setting."""
    rows: dict[tuple[str, str], Counts] = {}
    for policy in dict.fromkeys(policy for policy, _ in counts):
        settings = {setting: of for (name, setting), of in counts.items() if name == policy}
        merged: Counts = {}
        equal = True
        for suite, seed, played in (cell for of in settings.values() for cell in _flat(of)):
            known = merged.setdefault(suite, {}).setdefault(seed, played)
            equal &= np.array_equal(known.tasks, played.tasks)
        rows |= {(policy, ""): merged} if equal else {(policy, setting): of for setting, of in settings.items()}
    return rows


def _flat(counts: Counts) -> Iterable[tuple[str, Hashable, Played]]:
    return ((suite, seed, played) for suite, seeds in counts.items() for seed, played in seeds.items())


def _row(policy: str, setting: str, counts: Counts, suites: tuple[str, ...]) -> PublishedRow:
    cells = {suite: _cell({suite: seeds}) for suite, seeds in counts.items()}
    common = set.intersection(*(set(seeds) for seeds in counts.values())) if set(counts) == set(suites) else set()
    shared = {
        suite: {seed: played for seed, played in seeds.items() if seed in common} for suite, seeds in counts.items()
    }
    return PublishedRow(policy, setting, min(map(len, counts.values())), cells, _cell(shared) if common else None)


def _cell(counts: Counts) -> Cell:
    stacked = {suite: np.stack([played.tasks for played in seeds.values()], axis=1) for suite, seeds in counts.items()}
    totals = {suite: cells.sum(axis=(0, 1)) for suite, cells in stacked.items()}
    return Cell(
        rate=float(np.mean([k / n for k, n in totals.values()])),
        interval=bootstrap_mean(stacked, seed=BOOTSTRAP_SEED),
        k=int(sum(k for k, _ in totals.values())),
        n=int(sum(n for _, n in totals.values())),
        errors=sum(played.errors for seeds in counts.values() for played in seeds.values()),
    )
