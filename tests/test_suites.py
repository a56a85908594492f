"""Suites, init states and the episode plan."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from pi0rl.errors import UserError
from pi0rl.libero import suites
from pi0rl.libero.plan import episode_init_state, evaluation_plan, training_plan


def test_every_suite_ships_complete():
    assert len(suites.SUITES) == 21
    for suite in suites.SUITES:
        tasks = suites.suite_tasks(suite)
        assert len(tasks) == (90 if suite == "libero_90" else 10)
        for task in tasks:
            assert task.language == task.language.strip().lower() != ""
            states = suites.official_init_states(task)
            assert states.dtype == np.float64
            assert len(states) >= 10


def test_language_comes_from_the_problem_file():
    assert suites.task("libero_object", 7).language == "pick up the milk and place it in the basket"
    assert suites.task("libero_object_lan", 7).language == "grab milk and put into basket"
    assert suites.task("libero_10", 8).language == "put both moka pots on the stove"
    assert suites.task("libero_90", 0).language == "close the top drawer of the cabinet"
    assert suites.task("libero_goal_task", 0).language != suites.task("libero_goal", 0).language
    assert [suites.suite_tasks(s)[0].max_episode_steps for s in ("libero_goal_swap", "libero_10", "libero_90")] == [
        300,
        520,
        400,
    ]


def test_bad_names_give_one_clear_error():
    with pytest.raises(UserError, match="did you mean 'libero_object'"):
        suites.suite_tasks("libero_objekt")
    with pytest.raises(UserError, match="expected 0 to 9"):
        suites.task("libero_goal", 10)
    with pytest.raises(UserError, match="unknown split"):
        evaluation_plan(["libero_goal"], "heldout", 1, seed=0)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("suite", sorted(path.stem for path in suites.HELD_OUT_DIR.glob("*.npz")))
def test_held_out_states_are_disjoint_from_the_official_ones(suite):
    for task in suites.suite_tasks(suite):
        held_out, official = suites.held_out_init_states(task), suites.official_init_states(task)
        assert held_out.shape == (20, official.shape[1])
        hashes = {suites.state_hash(state) for state in held_out}
        assert len(hashes) == len(held_out)
        assert not hashes & {suites.state_hash(state) for state in official}


@pytest.mark.slow
@pytest.mark.parametrize(
    "suite", [suite for suite in suites.SUITES if not (suites.HELD_OUT_DIR / f"{suite}.npz").exists()]
)
def test_held_out_states_of_other_suites_are_made_when_asked_for(suite: str) -> None:
    tasks = suites.suite_tasks(suite)
    task = tasks[len(suite) % len(tasks)]
    held_out, official = suites.held_out_init_states(task), suites.official_init_states(task)
    assert held_out.shape == (20, official.shape[1])
    hashes = {suites.state_hash(state) for state in held_out}
    assert len(hashes) == len(held_out)
    assert not hashes & {suites.state_hash(state) for state in official}


def test_state_hash_ignores_the_clock_only():
    state = np.arange(5.0)
    later, moved = state.copy(), state.copy()
    later[0], moved[1] = 7.0, np.nextafter(1.0, 2.0)
    assert suites.state_hash(state) == suites.state_hash(later) != suites.state_hash(moved)


def test_evaluation_plan_takes_every_state_once():
    plan = evaluation_plan(["libero_goal", "libero_object"], "official", 50, seed=3)
    assert [episode.index for episode in plan] == list(range(1000))
    assert len({(episode.suite, episode.task_id, episode.init_state_id) for episode in plan}) == 1000
    with pytest.raises(UserError, match="ask for fewer"):
        evaluation_plan(["libero_goal"], "official", 51, seed=3)


def test_training_plan_is_balanced_seeded_and_grouped():
    def plan(iteration: int):
        return training_plan(["libero_object"], "official", 56, 8, 0, iteration, range(20, 50))

    assert plan(0) == plan(0) != plan(1)
    for episodes in (plan(0), plan(1)):
        for group in range(7):
            assert len({(e.task_id, e.init_state_id) for e in episodes if e.group == group}) == 1
        assert all(20 <= e.init_state_id < 50 for e in episodes)
    turns = Counter(e.task_id for iteration in range(10) for e in plan(iteration))
    assert set(turns.values()) == {56}
    assert episode_init_state(plan(0)[0]).dtype == np.float64
    with pytest.raises(UserError, match="multiple of the group size"):
        training_plan(["libero_object"], "official", 9, 8, 0, 0, range(50))


def test_importing_suites_is_light():
    heavy = ("torch", "robosuite", "mujoco", "libero")
    code = f"import pi0rl.libero.plan, sys; print(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
