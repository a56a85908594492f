"""The statistics against SciPy, statsmodels and exact calculations; tables that support no conclusion are refused."""

from __future__ import annotations

from itertools import product

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
    independent_episodes,
    mcnemar,
    mcnemar_power,
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


def test_pairs_from_one_state_share_a_coin() -> None:
    rng = np.random.default_rng(2)
    before, after = rng.random((2, 8, 3)) < [[[0.3]], [[0.7]]]
    states = np.repeat(np.arange(8), 3)
    test = mcnemar(before.ravel(), after.ravel(), states)
    net = (after.astype(int) - before).sum(axis=1)
    flipped = [abs(np.dot(net, signs)) >= abs(net.sum()) for signs in product((-1, 1), repeat=8)]
    assert test.p == pytest.approx(np.mean(flipped), abs=1e-12)
    assert (test.gained - test.lost, test.n) == (net.sum(), 24)
    # The same episodes over again prove nothing more.
    once, repeated = (np.tile(each[:, 0], 5) for each in (before, after)), np.tile(np.arange(8), 5)
    assert mcnemar(*once, repeated).p == pytest.approx(mcnemar(before[:, 0], after[:, 0]).p, abs=1e-12)


def test_episodes_from_one_state_are_worth_fewer() -> None:
    ones = np.ones(200, int)
    assert independent_episodes(np.arange(200) % 2, ones) == 200
    assert independent_episodes(5 * (np.arange(200) % 2), 5 * ones) == 200  # every state decides all its episodes
    assert independent_episodes(0 * ones, 5 * ones) == 200
    rng = np.random.default_rng(0)
    many = np.full(5000, 5)
    assert independent_episodes(rng.binomial(many, 0.4), many) == pytest.approx(25_000, rel=0.05)  # decides nothing
    # Half and half: as wide as the standard error over states says.
    rates = rng.binomial(5, rng.random(200)) / 5
    low, high = wilson_interval(rates.mean() * (n := independent_episodes((5 * rates).astype(int), 5 * ones)), n)
    assert high - low == pytest.approx(2 * 1.96 * rates.std() / np.sqrt(200), rel=0.02)
    assert 200 < n < 1000


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


@pytest.mark.parametrize(("k", "low", "high"), [(0, 0.0, 0.0188), (20, 0.9812, 1.0)])
def test_an_interval_of_equal_outcomes_has_a_width(k: int, low: float, high: float) -> None:
    tasks = _cells(*[(k, 20)] * 10)
    assert bootstrap_mean({"suite": tasks}, seed=0) == pytest.approx((low, high), abs=1e-4)
    # Further seeds begin in the same states; further suites do not.
    assert bootstrap_mean({"suite": tasks.repeat(3, axis=1)}, seed=0) == bootstrap_mean({"suite": tasks}, seed=0)
    of_four = bootstrap_mean(dict.fromkeys("abcd", tasks), seed=0)
    assert of_four == pytest.approx(wilson_interval(40 * k, 800), abs=1e-12)


@pytest.mark.parametrize(
    ("gained", "lost", "known"),
    [(0.31, 0.03, 34), (0.15, 0.05, 168), (0.03, 0.20, 64), (0.27, 0.02, 36), (0.99, 0.0, 6), (0.8, 0.0, 9)],
)
def test_episodes_to_separate_gives_the_power_of_the_exact_test(gained: float, lost: float, known: int) -> None:
    n = episodes_to_separate(gained, lost)
    assert n == known
    power = 0.0
    for discordant in range(1, n + 1):
        k = np.arange(discordant + 1)
        chances = stats.binom.pmf(k, discordant, 0.5)
        rejected = np.array([chances[chances <= chance * (1 + 1e-9)].sum() < 0.05 for chance in chances])
        given = stats.binom.pmf(k, discordant, gained / (gained + lost))
        power += stats.binom.pmf(discordant, n, gained + lost) * given[rejected].sum()
    assert power == pytest.approx(mcnemar_power(n, gained, lost), abs=1e-9)
    assert power >= 0.8 > mcnemar_power(n - 1, gained, lost)


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


def test_compare_counts_the_plays_of_a_state_together() -> None:
    once = _table({"sft": [False] * 5, "ppo": [True] * 5})
    twice = pd.concat([once, once.assign(seed=1001)])
    assert compare(once, "sft", "ppo").p == pytest.approx(2 / 2**5)
    assert compare(twice, "sft", "ppo").p == pytest.approx(2 / 2**5)
    assert compare(twice, "sft", "ppo").gained == 10


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
