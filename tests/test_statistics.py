"""The statistics against SciPy, statsmodels and exact calculations; tables that support no conclusion are refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar
from statsmodels.stats.proportion import proportion_confint

from pi0rl.errors import UserError
from pi0rl.evaluation.statistics import (
    bootstrap_mean,
    compare,
    episodes_to_separate,
    mcnemar,
    require_complete,
    wilson_interval,
)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (1, 10), (55, 100), (83, 100), (500, 500)])
def test_wilson_interval_is_that_of_statsmodels(k: int, n: int) -> None:
    assert wilson_interval(k, n) == pytest.approx(proportion_confint(k, n, method="wilson"), abs=1e-12)


@pytest.mark.parametrize(
    ("both", "gained", "lost", "neither"), [(52, 31, 3, 14), (0, 0, 0, 5), (4, 1, 0, 0), (9, 6, 6, 9)]
)
def test_mcnemar_is_that_of_statsmodels(both: int, gained: int, lost: int, neither: int) -> None:
    before = np.repeat([True, False, True, False], [both, gained, lost, neither])
    after = np.repeat([True, True, False, False], [both, gained, lost, neither])
    test = mcnemar(before, after)
    assert (test.gained, test.lost, test.n) == (gained, lost, len(before))
    assert test.p == pytest.approx(reference_mcnemar([[both, lost], [gained, neither]], exact=True).pvalue, abs=1e-12)


def test_mcnemar_refuses_arrays_that_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="equal shapes"):
        mcnemar([True], [True, False])


def test_bootstrap_of_one_task_is_that_of_scipy() -> None:
    outcomes = np.repeat([1.0, 0.0], [130, 70])
    reference = stats.bootstrap(
        (outcomes,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert bootstrap_mean({"suite": [(130, 200)]}, seed=1) == pytest.approx((reference.low, reference.high), abs=0.01)


def test_bootstrap_covers_the_choice_of_tasks() -> None:
    # Tasks that are all or nothing: the episodes of a task add no information, so the width is that of ten coin flips.
    low, high = bootstrap_mean({"suite": [(50, 50)] * 5 + [(0, 50)] * 5}, seed=0)
    assert (low, high) == pytest.approx(tuple(stats.binom.ppf([0.025, 0.975], 10, 0.5) / 10))
    assert bootstrap_mean({"a": [(3, 9)], "b": [(5, 7)]}, seed=4) == bootstrap_mean(
        {"a": [(3, 9)], "b": [(5, 7)]}, seed=4
    )


@pytest.mark.parametrize(("gained", "lost"), [(0.31, 0.03), (0.15, 0.05), (0.03, 0.20)])
def test_episodes_to_separate_gives_the_power_of_the_exact_test(gained: float, lost: float) -> None:
    n = episodes_to_separate(gained, lost)
    assert n is not None
    power = 0.0
    for discordant in range(1, n + 1):
        k = np.arange(discordant + 1)
        rejected = np.array([stats.binomtest(int(i), discordant).pvalue < 0.05 for i in k])
        given = stats.binom.pmf(k, discordant, gained / (gained + lost))
        power += stats.binom.pmf(discordant, n, gained + lost) * given[rejected].sum()
    # Connor's formula is for the asymptotic test; the exact one is a little weaker.
    assert 0.70 < power < 0.85


def test_equal_policies_cannot_be_separated() -> None:
    assert episodes_to_separate(0.1, 0.1) is None


def _table(outcomes: dict[str, list[bool]]) -> pd.DataFrame:
    rows = [
        {
            "policy": policy,
            "split": "held_out",
            "index": index,
            "suite": "libero_object",
            "task_id": index % 2,
            "task": f"task_{index % 2}",
            "language": "pick up the milk",
            "init_state_id": index // 2,
            "state_hash": f"{index:016x}",
            "seed": index,
            "success_once": success,
            "success_at_end": success,
            "steps": 90,
            "error": "",
            "video": "",
        }
        for policy, successes in outcomes.items()
        for index, success in enumerate(successes)
    ]
    return pd.DataFrame(rows)


def test_compare_pairs_by_plan_index_whatever_the_order_of_rows() -> None:
    table = _table({"sft": [True, False, False, True], "ppo": [True, True, True, False]})
    shuffled = table.sample(frac=1, random_state=np.random.default_rng(3))
    test = compare(shuffled, "sft", "ppo")
    assert (test.gained, test.lost, test.n) == (2, 1, 4)
    with pytest.raises(UserError, match="different plan indices"):
        compare(table.iloc[:-1], "sft", "ppo")


def test_a_complete_table_passes_and_incomplete_ones_are_refused() -> None:
    table = _table({"sft": [True, False, False, True], "ppo": [True, True, True, False]})
    require_complete(table, {"held_out": 4})

    errors = table.assign(error=["", "", "worker died\nTraceback"] + [""] * 5)
    with pytest.raises(UserError, match=r"1 of 8 episodes ended in an error.*index 2: worker died Traceback"):
        require_complete(errors, {"held_out": 4})
    with pytest.raises(
        UserError, match=r"'ppo' on split 'held_out': 3 episodes completed, 4 planned, first missing index 3"
    ):
        require_complete(table.iloc[:-1], {"held_out": 4})
    with pytest.raises(UserError, match="4 episodes completed, 5 planned"):
        require_complete(table, {"held_out": 5})
    with pytest.raises(UserError, match="index twice"):
        require_complete(pd.concat([table, table.iloc[:1]]), {"held_out": 4})
    with pytest.raises(UserError, match="plan index 1 of split 'held_out' is not the same episode"):
        require_complete(table.assign(state_hash=["a", "b", "c", "d", "a", "x", "c", "d"]), {"held_out": 4})
    with pytest.raises(UserError, match="'ppo' has no episodes of split 'official'"):
        require_complete(pd.concat([table, table.iloc[:4].assign(split="official")]), {"held_out": 4, "official": 4})
    with pytest.raises(UserError, match="no column 'steps'"):
        require_complete(table.drop(columns="steps"), {"held_out": 4})
