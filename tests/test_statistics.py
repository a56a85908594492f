"""The statistics against SciPy, statsmodels and exact calculations; tables that support no conclusion are refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from pi0rl.errors import UserError
from pi0rl.evaluation.completeness import require_complete
from pi0rl.evaluation.statistics import (
    bootstrap_mean,
    compare,
    episodes_to_separate,
    holm,
    mcnemar,
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


@pytest.mark.parametrize("p_values", [[0.01, 0.04, 0.03, 0.5], [0.04, 0.04], [1e-7], [0.9, 0.01, 0.01, 1.0, 0.2]])
def test_adjusted_p_values_are_those_of_statsmodels(p_values: list[float]) -> None:
    np.testing.assert_allclose(holm(p_values), multipletests(p_values, method="holm")[1], rtol=1e-12)


def _cells(*tasks: tuple[int, int]) -> np.ndarray:
    """(k, n) of every task under one seed."""
    return np.array(tasks)[:, None]


def test_bootstrap_of_one_task_is_that_of_scipy() -> None:
    outcomes = np.repeat([1.0, 0.0], [130, 70])
    reference = stats.bootstrap(
        (outcomes,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    low, high = bootstrap_mean({"suite": _cells((130, 200))}, seed=1)
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=0.01)


def test_bootstrap_covers_the_choice_of_tasks_and_of_seeds() -> None:
    # All or nothing: the episodes of a cell add no information, so the width is that of ten coin flips.
    coins = tuple(stats.binom.ppf([0.025, 0.975], 10, 0.5) / 10)
    cells = _cells(*[(50, 50)] * 5 + [(0, 50)] * 5)
    assert bootstrap_mean({"suite": cells}, seed=0) == pytest.approx(coins)
    seeds = cells.swapaxes(0, 1)
    assert bootstrap_mean({"suite": seeds}, seed=0) == pytest.approx(coins)
    # A seed is the same for every suite and task: more of them do not average its luck away.
    assert bootstrap_mean({name: seeds.repeat(4, axis=0) for name in "abc"}, seed=0) == pytest.approx(coins)
    both = {"a": _cells((3, 9)), "b": _cells((5, 7))}
    assert bootstrap_mean(both, seed=4) == bootstrap_mean(both, seed=4)


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
            "protocol": "abc",
            "split": "held_out",
            "seed": 1000,
            "index": index,
            "suite": "libero_object",
            "task_id": index % 2,
            "task": f"task_{index % 2}",
            "language": "pick up the milk",
            "init_state_id": index // 2,
            "state_hash": f"{index:016x}",
            "scene_seed": 0,
            "success_once": success,
            "success_at_end": success,
            "steps": 90,
            "seconds": 1.0,
            "failure": "" if success else "dropped",
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


def test_an_error_is_neither_success_nor_failure() -> None:
    table = _table({"sft": [True, False, False, True], "ppo": [True, True, True, False]})
    table.loc[1, "error"] = "the simulation diverged"
    test = compare(table, "sft", "ppo")
    assert (test.gained, test.lost, test.n) == (1, 1, 3)


def test_a_complete_table_passes_and_incomplete_ones_are_refused() -> None:
    table = _table({"sft": [True, False, False, True], "ppo": [True, True, True, False]})
    planned = {("held_out", 1000): 4}
    require_complete(table, planned)

    many = _table({"sft": [True] * 100})
    require_complete(many.assign(error=["worker died"] * 2 + [""] * 98), {("held_out", 1000): 100})
    errors = table.assign(error=["", "", "worker died\nTraceback"] + [""] * 5)
    with pytest.raises(UserError, match=r"1 of 4 episodes of 'sft' ended in an error.*index 2: worker died Traceback"):
        require_complete(errors, planned)
    with pytest.raises(
        UserError, match=r"'ppo' on split 'held_out', seed 1000: 3 episodes completed, 4 planned, first missing index 3"
    ):
        require_complete(table.iloc[:-1], planned)
    with pytest.raises(UserError, match="4 episodes completed, 5 planned"):
        require_complete(table, {("held_out", 1000): 5})
    with pytest.raises(UserError, match="index twice"):
        require_complete(pd.concat([table, table.iloc[:1]]), planned)
    with pytest.raises(UserError, match="plan index 1 of split 'held_out' is not the same episode"):
        require_complete(table.assign(state_hash=["a", "b", "c", "d", "a", "x", "c", "d"]), planned)
    both = planned | {("official", 1000): 4}
    with pytest.raises(UserError, match="'ppo' on split 'official', seed 1000: 0 episodes completed, 4 planned"):
        require_complete(pd.concat([table, table.iloc[:4].assign(split="official")]), both)
    with pytest.raises(UserError, match="seed 7: 4 episodes, none planned"):
        require_complete(pd.concat([table, table.iloc[:4].assign(seed=7)]), planned)
    with pytest.raises(UserError, match="protocols abc, def in one table"):
        require_complete(table.assign(protocol=["abc"] * 4 + ["def"] * 4), planned)
    with pytest.raises(UserError, match="no column 'steps'"):
        require_complete(table.drop(columns="steps"), planned)
