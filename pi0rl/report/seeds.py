"""The same experiment under other seeds: how much of a result is luck."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pi0rl.errors import UserError
from pi0rl.evaluation.statistics import PairedTest, bootstrap_mean, compare
from pi0rl.params import Params, load_params
from pi0rl.report.inputs import Run, read_run
from pi0rl.report.tables import BOOTSTRAP_SEED, ordered_policies, success_counts


@dataclass(frozen=True)
class SeedResult:
    """One seed's run: mean success over its episodes of the policy before and after, and the paired test."""

    name: str
    seed: int
    before: float
    after: float
    test: PairedTest


@dataclass(frozen=True)
class SeedSummary:
    """All seeds.

    Attributes:
        runs: one per seed, by seed.
        before, after: mean over seeds and suites, with the interval of a bootstrap over tasks, seeds and episodes; a
            start that all seeds share counts once.
    """

    runs: tuple[SeedResult, ...]
    before: tuple[float, tuple[float, float]]
    after: tuple[float, tuple[float, float]]


def sibling_runs(params: Params, runs: Path) -> list[Path]:
    """Finished runs anywhere below ``runs`` whose params differ from ``params`` in the seed alone, by seed."""
    found = {}
    for path in sorted(runs.rglob("params.yaml")):
        if not (path.parent / "evaluate" / "episodes.parquet").is_file():
            continue
        try:
            other = load_params(path)
        except UserError:  # made for other code
            continue
        if other.seed != params.seed and _alike(other, params):
            found.setdefault(other.seed, path.parent)
    return [found[seed] for seed in sorted(found)]


def _alike(other: Params, params: Params) -> bool:
    """Whether they differ in the seed alone; imitation has either the same seed in both or the experiment's."""
    seeds = (other.sft.seed, params.sft.seed)
    sft = other.sft.model_copy(update={"seed": params.sft.seed})
    same = other.model_copy(update={"seed": params.seed, "sft": sft}) == params
    return same and (seeds[0] == seeds[1] or seeds == (other.seed, params.seed))


def read_siblings(folders: Sequence[Path]) -> tuple[Run, ...]:
    """The runs whose tables support a conclusion; the others say nothing about this one, and are left out."""
    runs = []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except UserError:  # unfinished, say
            continue
    return tuple(runs)


def summarise_seeds(runs: Sequence[Run]) -> SeedSummary | None:
    """Compare the first trained policy with the start under every seed; None for fewer than two runs."""
    runs = sorted(runs, key=lambda run: run.params.seed)
    policies = ordered_policies(runs[0].episodes) if runs else ()
    if len(runs) < 2 or len(policies) < 2 or any(ordered_policies(run.episodes) != policies for run in runs):
        return None
    results = []
    for run in runs:
        before, after = (_mean(run, policy) for policy in policies[:2])
        test = compare(run.episodes, policies[0], policies[1])
        results.append(SeedResult(run.directory.name, run.params.seed, before, after, test))
    starts = {run.sft_dir: run for run in runs if run.params.fetch is None} or {runs[0].sft_dir: runs[0]}
    return SeedSummary(tuple(results), _pooled(list(starts.values()), policies[0]), _pooled(runs, policies[1]))


def _cells(run: Run, policy: str) -> dict[str, np.ndarray]:
    episodes = run.episodes.query("policy == @policy and error == ''")
    return {str(suite): success_counts(of_suite) for suite, of_suite in episodes.groupby("suite", sort=True)}


def _mean(run: Run, policy: str) -> float:
    totals = [cells.sum(axis=(0, 1)) for cells in _cells(run, policy).values()]
    return float(np.mean([k / n for k, n in totals]))


def _pooled(runs: Sequence[Run], policy: str) -> tuple[float, tuple[float, float]]:
    by_run = [_cells(run, policy) for run in runs]
    # One training seed is one seed here: what its policy played with several noise seeds is pooled.
    cells = {
        suite: np.concatenate([cells[suite].sum(axis=1, keepdims=True) for cells in by_run], axis=1)
        for suite in by_run[0]
    }
    return float(np.mean([_mean(run, policy) for run in runs])), bootstrap_mean(cells, seed=BOOTSTRAP_SEED)
