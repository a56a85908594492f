"""The gymnasium environment: LIBERO's numbers and pictures through gymnasium's interface."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import pi0rl.libero
from pi0rl.errors import UserError
from pi0rl.libero.compile import reference_variables
from pi0rl.libero.env import NO_INIT_STATE_ID, LiberoEnv
from pi0rl.libero.suites import official_init_states, task

REFERENCE = Path(__file__).parent / "reference_env.py"
ID = "pi0rl/Libero-v0"
SMALL: dict[str, Any] = {"camera_size": 32, "render_profile": "fast"}
CLOSE = np.array([0.3, -0.2, -0.5, 0.1, 0.0, 0.2, 1.0])


@pytest.fixture
def env() -> LiberoEnv:
    return LiberoEnv("libero_goal", 7, **SMALL)


def assert_equal_to_reference(suite: str, task_id: int, size: int, init_state_id: int | None, folder: Path) -> None:
    """The same seed, init state and actions here and there; float32 actions, some beyond [-1, 1]."""
    scene, seed = task(suite, task_id), 3
    actions = np.random.default_rng(0).uniform(-1.3, 1.3, (12, 7)).astype(np.float32)
    given = {"actions": actions}
    if init_state_id is not None:
        given["init_state"] = official_init_states(scene)[init_state_id]
    np.savez(folder / "input.npz", allow_pickle=False, **given)
    files = [str(folder / "input.npz"), str(folder / "output.npz")]
    command = [sys.executable, str(REFERENCE), str(scene.bddl_file), str(seed), str(size), *files]
    subprocess.run(command, env=reference_variables(), check=True, capture_output=True, stdin=subprocess.DEVNULL)
    reference = dict(np.load(folder / "output.npz"))

    env = gymnasium.make(ID, suite=suite, task_id=task_id, camera_size=size, render_profile="reference")
    ours: Any = env.unwrapped
    options = {"settle_steps": 0} | ({} if init_state_id is None else {"init_state_id": init_state_id})
    (observation, info), reward, done = env.reset(seed=seed, options=options), 0.0, False
    for row in range(len(actions) + 1):
        if row:
            observation, reward, done, _, info = env.step(actions[row - 1])
        seen = {name: value for name, value in observation.items() if name != "state"}
        for name, value in {**seen, "qpos": ours.qpos, "qvel": ours.qvel, "reward": reward, "done": done}.items():
            assert np.asarray(value).dtype == reference[name].dtype, name
            assert np.array_equal(value, reference[name][row]), f"{name} at step {row}"
        assert info["is_success"] == bool(reference["done"][row])


def test_equals_the_reference(tmp_path: Path) -> None:
    assert_equal_to_reference("libero_goal", 7, 128, 5, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("init_state_id", [4, None])
@pytest.mark.parametrize(
    ("suite", "task_id", "size"),
    [("libero_spatial", 5, 256), ("libero_object", 2, 224), ("libero_10", 8, 128), ("libero_90", 40, 128)],
)
def test_equals_the_reference_in_other_suites(
    suite: str, task_id: int, size: int, init_state_id: int | None, tmp_path: Path
) -> None:
    assert_equal_to_reference(suite, task_id, size, init_state_id, tmp_path)


def test_gymnasium_s_checker_passes() -> None:
    env = gymnasium.make(ID, suite="libero_goal", task_id=7, render_mode="rgb_array", **SMALL)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env.unwrapped)
    # Positions have no bounds.
    assert [str(each.message) for each in caught if "infinity" not in str(each.message)] == []
    picture: Any = env.unwrapped.render()
    assert picture.shape == (32, 32, 3)


def test_an_id_that_names_its_module_needs_no_import() -> None:
    program = (
        "import gymnasium, sys\n"
        "env = gymnasium.make('pi0rl.libero:pi0rl/Libero-v0', suite='libero_goal', task_id=7, camera_size=32, "
        "render_profile='fast')\n"
        "env.reset(seed=0)\n"
        "print(env.unwrapped.language)\n"
        "print([name for name in ('ray', 'torch', 'robosuite', 'libero', 'pandas', 'mlflow') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert result.stdout.splitlines() == ["turn on the stove", "[]"]


def test_observation_and_info(env: LiberoEnv) -> None:
    observation, info = env.reset(options={"init_state_id": np.int64(2)})
    assert info == {"is_success": False, "steps": 0, "init_state_id": 2}
    assert observation in env.observation_space
    assert list(observation) == [
        "agentview_image", "robot0_eye_in_hand_image", "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos",
        "state",
    ]  # fmt: skip
    assert (env.language, env.task.task_id) == ("turn on the stove", 7)
    given, info = env.reset(options={"init_state": official_init_states(env.task)[2]})
    assert info["init_state_id"] == NO_INIT_STATE_ID
    assert all(np.array_equal(given[name], observation[name]) for name in observation)


def test_resets_repeat_with_a_seed_and_vary_without(env: LiberoEnv) -> None:
    def resets() -> tuple[list[int], list[np.ndarray]]:
        ids, states = [], []
        for seed in (3, None, None, None):
            ids.append(env.reset(seed=seed)[1]["init_state_id"])
            states.append(env.qpos)
            env.step(CLOSE)
        return ids, states

    (first_ids, first), (second_ids, second) = resets(), resets()
    assert first_ids == second_ids
    assert first_ids[0] == NO_INIT_STATE_ID
    assert len(set(first_ids)) == 4
    assert np.array_equal(first, second)


def test_an_episode_ends_with_success_or_at_the_limit_and_may_go_on(env: LiberoEnv) -> None:
    short = LiberoEnv("libero_goal", 7, step_limit=3, **SMALL)
    assert LiberoEnv("libero_goal", 7, **SMALL).step_limit == 300
    short.reset(seed=0)
    outcomes = [short.step(CLOSE)[2:4] for _ in range(4)]
    assert outcomes == [(False, False), (False, False), (False, True), (False, True)]
    short.reset()
    assert short.step(CLOSE)[2:4] == (False, False)

    lit = official_init_states(env.task)[0].copy()
    address = env._simulation._compiled.goal[0].qpos[0]  # pyright: ignore[reportAttributeAccessIssue]
    lit[1 + address] = 1.0
    assert env.reset(options={"init_state": lit, "settle_steps": 0})[1]["is_success"]
    _, reward, terminated, truncated, info = env.step(CLOSE)
    assert (reward, terminated, truncated, info) == (1.0, True, False, {"is_success": True, "steps": 1})
    assert env.step(CLOSE)[2]
    assert env.step_chunk(np.tile(CLOSE, (5, 1)))[4]["steps"] == 1
    assert not env.reset(options={"init_state_id": 0})[1]["is_success"]


def test_a_chunk_is_its_steps(env: LiberoEnv) -> None:
    other = LiberoEnv("libero_goal", 7, **SMALL)
    actions = np.random.default_rng(1).uniform(-1, 1, (5, 7))
    for each in (env, other):
        each.reset(seed=0, options={"init_state_id": 1})
    observation, reward, *_, info = env.step_chunk(actions)
    for action in actions:
        last = other.step(action)[0]
    assert (reward, info["steps"]) == (0.0, 5)
    assert all(np.array_equal(observation[name], last[name]) for name in last)
    assert np.array_equal(env.qvel, other.qvel)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"suite": "libero_gaol", "task_id": 0}, "did you mean 'libero_goal'"),
        ({"suite": "libero_goal", "task_id": 10}, "expected 0 to 9"),
        ({"suite": "libero_goal", "task_id": "3"}, "unknown task '3'"),
        ({"suite": "libero_goal", "task_id": 7, "camera_size": 0}, "expected 1 to 4096"),
        ({"suite": "libero_goal", "task_id": 7, "render_profile": "quick"}, "expected reference or fast"),
        ({"suite": "libero_goal", "task_id": 7, "step_limit": 0}, "expected 1 or more"),
        ({"suite": "libero_goal", "task_id": 7, "render_mode": "ansi"}, "expected 'rgb_array' or None"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        gymnasium.make(ID, **arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_state_id": 50}, "expected 0 to 49"),
        ({"init_state_id": -1}, "expected 0 to 49"),
        ({"init_state_id": "first"}, "expected a whole number"),
        ({"init_state": np.zeros(5)}, r"init state of shape \(5,\)"),
        ({"init_state": "first"}, "expected an array of numbers"),
        ({"init_state": np.zeros(5), "init_state_id": 0}, "not both"),
        ({"settle_steps": -1}, "expected 0 or more"),
        ({"init_state_ids": 0}, "unknown reset option 'init_state_ids'"),
    ],
)
def test_bad_options_are_refused_in_one_line(env: LiberoEnv, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        env.reset(options=options)
    with pytest.raises(UserError, match=r"seed -1: expected 0 to 2\*\*32 - 1"):
        env.reset(seed=-1)


def test_bad_actions_are_refused_before_anything_moves(env: LiberoEnv) -> None:
    env.reset(seed=0)
    before = env.qpos
    chunk = np.zeros((3, 7))
    chunk[2, 3] = np.nan
    for actions, message in (
        (np.zeros((0, 7)), r"expected \(C, 7\)"),
        (np.zeros(7), r"expected \(C, 7\)"),
        (chunk, "NaN"),
    ):
        with pytest.raises(UserError, match=message):
            env.step_chunk(actions)
    wrong: list[Any] = [np.zeros(6), np.zeros((1, 7)), np.full(7, np.inf), [[0.0], [0.0, 1.0]], "up", None]
    for action in wrong:
        with pytest.raises(UserError, match="action"):
            env.step(action)
    assert np.array_equal(env.qpos, before)


def test_importing_the_package_registers_the_environment() -> None:
    assert pi0rl.libero.__doc__
    assert gymnasium.spec(ID).vector_entry_point == "pi0rl.libero.vector_env:LiberoVectorEnv"
