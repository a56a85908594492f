"""The vector environment: the same as single ones, in processes that never stay behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import psutil
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from pi0rl.errors import UserError
from pi0rl.libero.env import LiberoEnv
from pi0rl.libero.suites import official_init_states, task
from pi0rl.libero.vector_env import LiberoVectorEnv
from pi0rl.libero.worker import WorkerDied

TASKS = (("libero_goal", 7), ("libero_spatial", 0), ("libero_goal", 7))
SETTINGS: dict[str, Any] = {"camera_size": 32, "render_profile": "fast", "step_limit": 4}
SUITES, TASK_IDS = zip(*TASKS, strict=True)


@pytest.fixture(scope="module")
def envs() -> Iterator[LiberoVectorEnv]:
    envs = LiberoVectorEnv(3, SUITES, TASK_IDS, workers=2, **SETTINGS)
    yield envs
    envs.close()


def assert_same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert_same(ours[name], theirs[name])
    else:
        assert np.asarray(ours).dtype == np.asarray(theirs).dtype
        np.testing.assert_array_equal(ours, theirs)


def test_equals_single_environments_also_after_autoreset(envs: LiberoVectorEnv) -> None:
    single = SyncVectorEnv([lambda each=each: LiberoEnv(*each, **SETTINGS) for each in TASKS])
    assert envs.metadata["autoreset_mode"] == single.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    assert envs.observation_space == single.observation_space
    assert envs.action_space == single.action_space
    rng = np.random.default_rng(0)
    pairs = [(envs.reset(seed=[3, 0, 0]), single.reset(seed=[3, 0, 0]))]
    for _ in range(7):
        actions = rng.uniform(-1, 1, (3, 7))
        pairs.append((envs.step(actions), single.step(actions)))
    for ours, theirs in pairs:
        for part, expected in zip(ours, theirs, strict=True):
            assert_same(part, expected)
    assert_same(np.array(envs.get_attr("qpos")[1]), single.get_attr("qpos")[1])
    assert envs.languages == single.get_attr("language")


def test_a_chunk_is_its_steps_until_the_episode_ends(envs: LiberoVectorEnv) -> None:
    actions = np.random.default_rng(1).uniform(-1, 1, (3, 6, 7))
    envs.reset(options={"init_state_id": [1, 2, 3]})
    observation, rewards, terminated, truncated, infos = envs.step_chunk(actions)
    assert infos["steps"].tolist() == [4, 4, 4]
    assert truncated.all()
    assert not terminated.any()
    assert rewards.tolist() == [0, 0, 0]
    envs.reset(options={"init_state_id": [1, 2, 3]})
    for step in range(4):
        last = envs.step(actions[:, step])[0]
    assert_same(observation, last)
    # The next call only resets.
    assert envs.step_chunk(actions)[4]["steps"].tolist() == [0, 0, 0]


def test_some_may_be_reset_alone(envs: LiberoVectorEnv) -> None:
    before, _ = envs.reset(options={"init_state_id": 0, "settle_steps": 0})
    mask = np.array([False, True, False])
    state = official_init_states(task(*TASKS[1]))[4]
    options = {"init_state": [None, state, None], "settle_steps": 0, "reset_mask": mask}
    after, infos = envs.reset(options=options)
    assert infos["_init_state_id"].tolist() == mask.tolist()
    changed = (before["agentview_image"] != after["agentview_image"]).any(axis=(1, 2, 3))
    assert changed.tolist() == mask.tolist()
    assert np.array_equal(envs.get_attr("qpos")[1], state[1 : 1 + len(envs.get_attr("qpos")[1])])


def test_gymnasium_makes_it() -> None:
    envs = gymnasium.make_vec(
        "pi0rl/Libero-v0", num_envs=2, suite="libero_goal", task_id=7, workers=1, render_mode="rgb_array", **SETTINGS
    )
    observation, _ = envs.reset(seed=[0, 0])
    assert observation in envs.observation_space
    pictures = envs.render()
    assert pictures is not None
    assert np.array_equal(pictures[1][::-1], observation["agentview_image"][1])
    envs.close()


def test_bad_input_is_one_clear_error_and_harms_nothing(envs: LiberoVectorEnv) -> None:
    envs.reset(options={"init_state_id": 0})
    with pytest.raises(UserError, match=r"expected \(3, C, 7\)"):
        envs.step_chunk(np.zeros((3, 7)))
    with pytest.raises(UserError, match="NaN"):
        envs.step(np.full((3, 7), np.nan))
    with pytest.raises(UserError, match="2 values of init_state_id: expected one, or one for each of 3"):
        envs.reset(options={"init_state_id": [0, 1]})
    with pytest.raises(UserError, match="expected 0 to 49"):
        envs.reset(options={"init_state_id": [0, 50, 0]})
    with pytest.raises(UserError, match="unknown suite"):
        LiberoVectorEnv(1, "libero_gaol", 0)
    assert envs.step(np.zeros((3, 7)))[4]["steps"].tolist() == [1, 1, 1]


def test_a_dead_worker_is_one_clear_error() -> None:
    envs = LiberoVectorEnv(2, "libero_goal", 7, workers=2, **SETTINGS)
    worker = envs._workers[1].process
    worker.kill()
    with pytest.raises(WorkerDied, match=r"worker died \(exit code -9"):
        envs.reset(seed=[0, 0])
    processes = [psutil.Process(each.process.pid) for each in envs._workers if each.process.poll() is None]
    envs.close()
    assert not any(process.is_running() for process in processes)


def test_no_worker_outlives_a_killed_parent() -> None:
    program = (
        "import time\n"
        "from pi0rl.libero.vector_env import LiberoVectorEnv\n"
        f"envs = LiberoVectorEnv(2, 'libero_goal', 7, workers=2, **{SETTINGS!r})\n"
        "print(*(worker.process.pid for worker in envs._workers), flush=True)\n"
        "time.sleep(300)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 60
    while any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers):
        assert time.monotonic() < deadline, "a worker is left"
        time.sleep(0.1)
