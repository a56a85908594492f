"""The simulation against LIBERO's own environment: every number equal, and its edges."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import mujoco
import numpy as np
import pytest

from pi0rl.errors import UserError
from pi0rl.libero import goal, settle, suites
from pi0rl.libero.compile import compiled_task, reference_variables
from pi0rl.libero.simulation import Simulation
from pi0rl.libero.suites import Task, official_init_states, task

ROLLOUT = Path(__file__).parent / "reference_rollout.py"
OBSERVED = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")


def contact_rich_actions(rng: np.random.Generator, steps: int) -> np.ndarray:
    """Pushes into the table, saturating moves and turns, resting rotations, and a gripper that opens and closes."""
    actions = np.empty((steps, 7))
    for start in range(0, steps, 10):
        action = rng.uniform(-1.5, 1.5, 7)
        kind = (start // 10) % 4
        if kind == 0:
            action[:6] = [0.2, 0.0, -1.0, 0.0, 0.0, 0.0]
        elif kind == 2:
            action[3:6] = 0.0
        actions[start : start + 10] = action
    return actions


def probing_states(scene: Task, init_state: np.ndarray) -> np.ndarray:
    """States on both sides of every goal test: objects dropped around their places, joints around their thresholds."""
    simulation = Simulation(scene)
    simulation.reset(init_state, settle_steps=0)
    model, data = simulation.model, simulation.data
    probes = []
    for test in compiled_task(scene, 0).goal:
        if isinstance(test, goal.JointTest):
            for offset in (-0.1, -1e-9, 0.0, 1e-9, 0.1):
                probe = init_state.copy()
                probe[1 + np.array(test.qpos)] = test.threshold + offset
                probes.append(probe)
            continue
        moved = test.upper_body if isinstance(test, goal.OnObject) else test.body
        place = data.xpos[test.lower_body] if isinstance(test, goal.OnObject) else data.site_xpos[test.site]
        address = 1 + model.jnt_qposadr[model.body_jntadr[moved]]
        for height in (-0.02, 0.0, 0.005, 0.01, 0.02, 0.04, 0.08, 0.2):
            for aside in (0.0, 0.02, 0.04):
                probe = init_state.copy()
                probe[address : address + 3] = place + np.array([aside, 0.0, height])
                probes.append(probe)
    return np.array(probes)


def assert_equal_to_reference(scene: Task, seed: int, steps: int, folder: Path) -> None:
    """Run the same episode here and in the reference and compare all of it bit for bit."""
    states = official_init_states(scene)
    init_state = states[seed % len(states)]
    actions = contact_rich_actions(np.random.default_rng(seed), steps)
    probes = probing_states(scene, init_state)
    np.savez(folder / "input.npz", init_state=init_state, actions=actions, probes=probes)
    command = [sys.executable, ROLLOUT, scene.bddl_file, str(seed), folder / "input.npz", folder / "output.npz"]
    subprocess.run(command, env=reference_variables(), check=True, capture_output=True, stdin=subprocess.DEVNULL)
    reference = dict(np.load(folder / "output.npz"))

    simulation = Simulation(scene, seed)
    simulation.reset(init_state, settle_steps=0)
    touched = 0
    for row in range(steps + 1):
        success = simulation.step(actions[row - 1]) if row else simulation.success()
        robot = simulation.proprioception()
        ours = {"qpos": simulation.qpos, "qvel": simulation.qvel, "success": success}
        ours |= {name: robot[name] for name in OBSERVED}
        for name, value in ours.items():
            assert np.array_equal(value, reference[name][row]), f"{scene.suite} {scene.task_id} {name} at step {row}"
        touched = max(touched, simulation.data.ncon)
    assert touched > 0
    simulation.step(actions[0])  # The next picture shows the sites as the last compared step left them.
    assert np.array_equal(simulation.render_state().site_rgba, reference["site_rgba"][-1])

    probed = []
    for probe in probes:
        simulation.reset(probe, settle_steps=0)
        probed.append(simulation.success())
    assert probed == reference["probed"].tolist()


@pytest.mark.parametrize(("suite", "task_id"), [("libero_spatial", 0), ("libero_goal", 7)])
def test_identical_to_the_reference(suite: str, task_id: int, tmp_path: Path) -> None:
    assert_equal_to_reference(task(suite, task_id), seed=3, steps=60, folder=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("suite", suites.SUITES)
def test_identical_to_the_reference_in_every_suite(suite: str, tmp_path: Path) -> None:
    tasks = suites.suite_tasks(suite)
    scene = tasks[len(suite) % len(tasks)]
    assert_equal_to_reference(scene, seed=len(suite), steps=scene.max_episode_steps, folder=tmp_path)


def test_goal_tests_tell_both_sides(tmp_path: Path) -> None:
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
