"""The simulation against LIBERO's own environment: every number equal, and its edges."""

from __future__ import annotations

import subprocess
import sys
import time

import mujoco
import numpy as np
import pytest

from benchmarks.exactness import SIZES, compare, contact_rich_actions, probing_states, telling_tasks
from pi0rl.errors import UserError
from pi0rl.libero import settle, suites
from pi0rl.libero.compile import compiled_task
from pi0rl.libero.simulation import Simulation
from pi0rl.libero.suites import official_init_states, task


@pytest.mark.parametrize(("suite", "task_id", "size"), [("libero_spatial", 0, 224), ("libero_goal", 7, 256)])
def test_identical_to_the_reference(suite: str, task_id: int, size: int) -> None:
    comparison = compare(task(suite, task_id), seed=3, steps=60, sizes=(size,), looks=2)
    assert comparison.differences == ()
    assert comparison.contacts > 0
    assert comparison.probes > 0


@pytest.mark.slow
@pytest.mark.parametrize("suite", suites.SUITES)
def test_identical_to_the_reference_in_every_suite(suite: str) -> None:
    for task_id in telling_tasks(suite):
        scene = task(suite, task_id)
        comparison = compare(scene, seed=task_id + 1, steps=scene.max_episode_steps, sizes=SIZES)
        assert comparison.differences == (), scene.name


def test_goal_tests_tell_both_sides() -> None:
    """The probes of the exactness test are worth something: some succeed and some do not."""
    for suite, task_id in (("libero_spatial", 0), ("libero_goal", 7)):
        scene = task(suite, task_id)
        simulation = Simulation(scene)
        outcomes = set()
        for probe in probing_states(scene, official_init_states(scene)[3]):
            simulation.reset(probe, settle_steps=0)
            outcomes.add(simulation.success())
        assert outcomes == {False, True}, scene.name


def test_an_episode_does_not_depend_on_what_came_before() -> None:
    scene = task("libero_spatial", 0)
    states = official_init_states(scene)
    actions = contact_rich_actions(np.random.default_rng(0), 20)
    fresh = Simulation(scene)
    fresh.reset(states[1])
    fresh.step_chunk(actions)
    used = Simulation(scene)
    used.reset(states[2])
    used.step_chunk(-actions)
    used.reset(states[1])
    for action in actions:
        used.step(action)
    assert np.array_equal(fresh.qpos, used.qpos)
    assert np.array_equal(fresh.qvel, used.qvel)
    assert np.array_equal(fresh.state(), used.state())


def test_reset_takes_under_two_milliseconds() -> None:
    scene = task("libero_spatial", 0)
    simulation = Simulation(scene)
    state = official_init_states(scene)[0]
    durations = []
    for _ in range(20):
        start = time.process_time()
        simulation.reset(state, settle_steps=0)
        durations.append(time.process_time() - start)
    assert min(durations) < 2e-3


def test_a_new_process_needs_neither_robosuite_nor_libero() -> None:
    compiled_task(task("libero_spatial", 0), 0)
    program = (
        "import sys\n"
        "from pi0rl.libero.simulation import Simulation\n"
        "from pi0rl.libero.suites import task\n"
        "Simulation(task('libero_spatial', 0))\n"
        "print([name for name in ('robosuite', 'libero', 'torch', 'ray', 'OpenGL') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"


def test_the_policy_state_holds_position_rotation_and_fingers() -> None:
    simulation = Simulation(task("libero_spatial", 0))
    robot = simulation.proprioception()
    state = simulation.state()
    assert state.shape == (8,)
    assert state.dtype == np.float32
    assert np.allclose(state[:3], robot["robot0_eef_pos"])
    assert np.allclose(state[6:], robot["robot0_gripper_qpos"])
    half_angle = np.arccos(robot["robot0_eef_quat"][3])
    assert np.allclose(state[3:6] / (2 * half_angle) * np.sin(half_angle), robot["robot0_eef_quat"][:3], atol=1e-6)


def test_the_settle_probe_finds_the_bowl_on_its_ramekin() -> None:
    assert settle.settle_probe() == pytest.approx(settle.EXPECTED_DISTANCE, abs=5e-4)


def test_bad_input_is_refused_in_one_line() -> None:
    simulation = Simulation(task("libero_spatial", 0))
    with pytest.raises(UserError, match=r"shape \(6,\): expected \(7\)"):
        simulation.step(np.zeros(6))
    with pytest.raises(UserError, match=r"expected \(C, 7\)"):
        simulation.step_chunk(np.zeros(7))
    with pytest.raises(UserError, match="NaN"):
        simulation.step(np.full(7, np.nan))
    with pytest.raises(UserError, match=r"init state of shape \(5,\)"):
        simulation.reset(np.zeros(5))


def test_another_mujoco_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mujoco, "__version__", "3.17.0")
    compiled_task.cache_clear()
    with pytest.raises(UserError, match=r"mujoco 3\.17\.0 is installed"):
        Simulation(task("libero_spatial", 0))
