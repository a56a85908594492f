"""The scripted expert and the demonstrations it leaves, on the real simulator."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pi0rl.errors import UserError
from pi0rl.libero.expert import Expert
from pi0rl.libero.plan import Split, init_states
from pi0rl.libero.simulation import Simulation
from pi0rl.libero.suites import suite_tasks
from pi0rl.sft.collection import ROUNDS, collect, parts_fingerprint, shuffled_episodes
from pi0rl.sft.demonstrations import load
from pi0rl.sft.recording import BURST_PERIOD, BURST_STEPS, Collection

SMALL = Collection(
    ("libero_object",),
    episodes_per_task=1,
    init_state_ids=(0, 3),
    seed=0,
    camera_size=16,
    image_stride=8,
    action_noise=0.5,
)


def play(
    suite: str, task_id: int, init_state_id: int, noise: float = 0.0, split: Split = "official"
) -> tuple[bool, int]:
    """Success and control steps of one episode."""
    task = suite_tasks(suite)[task_id]
    simulation = Simulation(task)
    simulation.reset(init_states(task, split)[init_state_id])
    expert = Expert(simulation, np.random.default_rng(0))
    for step in range(task.max_episode_steps):
        action = expert.action()
        assert action.shape == (7,)
        assert np.abs(action).max() <= 1.0
        if simulation.step(expert.disturb(action, noise) if noise else action):
            return True, step + 1
    return False, task.max_episode_steps


@pytest.mark.parametrize(
    ("suite", "task_id", "limit"),
    [
        pytest.param("libero_object", 0, 110, id="whole objects from above"),
        pytest.param("libero_spatial", 2, 130, id="a bowl by its rim"),
        pytest.param("libero_goal", 0, 250, id="pull a drawer"),
        pytest.param("libero_goal", 5, 200, id="drag a plate"),
        pytest.param("libero_goal", 7, 200, id="turn a knob"),
        pytest.param("libero_goal", 9, 250, id="from the side onto a rack"),
        pytest.param("libero_10", 3, 500, id="into a drawer and push it shut"),
        pytest.param("libero_10", 5, 250, id="turn a book into a narrow place"),
        pytest.param("libero_10", 9, 500, id="into a microwave and shut its door"),
    ],
)
def test_expert_has_the_skill(suite: str, task_id: int, limit: int) -> None:
    success, steps = play(suite, task_id, init_state_id=10)
    assert success
    assert steps < limit


def test_expert_recovers_from_disturbed_actions() -> None:
    assert play("libero_object", 1, init_state_id=0, noise=0.3)[0]


def test_expert_stands_still_where_nothing_can_be_gripped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pi0rl.libero.grasping.MAX_OPENING", 0.0)
    simulation = Simulation(suite_tasks("libero_object")[0])
    simulation.reset(init_states(simulation.task, "official")[0])
    np.testing.assert_array_equal(Expert(simulation, np.random.default_rng(0)).action(), [0, 0, 0, 0, 0, 0, -1])


@pytest.mark.slow
@pytest.mark.parametrize("split", ["official", "held_out"])
@pytest.mark.parametrize("suite", ["libero_spatial", "libero_object", "libero_goal", "libero_10"])
def test_expert_succeeds_on_nearly_all_init_states(suite: str, split: Split) -> None:
    least = {"libero_goal": 0.8, "libero_10": 0.7}.get(suite, 0.9)
    results = [play(suite, task_id, state, split=split)[0] for task_id in range(10) for state in range(5)]
    assert np.mean(results) >= least


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demonstrations") / "one_worker"
    collect(SMALL, directory, workers=1)
    return directory


def test_bytes_do_not_depend_on_the_number_of_workers(collected: Path, tmp_path: Path) -> None:
    collect(SMALL, tmp_path / "two_workers", workers=2)
    names = sorted(path.relative_to(collected) for path in collected.rglob("*") if path.is_file())
    assert len(names) == 12  # card, steps, ten tasks' images
    for name in names:
        assert (tmp_path / "two_workers" / name).read_bytes() == (collected / name).read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_load_returns_what_the_policy_would_see(collected: Path) -> None:
    demonstrations = load(collected)
    steps = len(demonstrations)
    assert demonstrations.actions.shape == (steps, 7)
    assert demonstrations.episode.max() == 9
    assert (np.diff(demonstrations.looks)[demonstrations.step[demonstrations.looks[1:]] > 0] == 8).all()
    last = demonstrations.looks[-1]
    observation = demonstrations.observation(np.array([0, last]))
    assert observation.base_image.shape == observation.wrist_image.shape == (2, 16, 16, 3)
    assert observation.prompt[0] == suite_tasks("libero_object")[0].language
    np.testing.assert_array_equal(observation.state[1], demonstrations.state[last])
    with pytest.raises(UserError, match="without images"):
        demonstrations.observation(np.array([1]))
    statistics = demonstrations.card["norm_stats"]["actions"]
    np.testing.assert_allclose(statistics["mean"], demonstrations.actions.mean(axis=0, dtype=np.float64))


def test_disturbances_come_in_bursts_that_the_steps_remember(collected: Path) -> None:
    demonstrations = load(collected)
    for episode in range(10):
        phases = demonstrations.step[(demonstrations.episode == episode) & demonstrations.disturbed] % BURST_PERIOD
        assert len(np.unique(phases)) == BURST_STEPS


def test_load_refuses_damaged_and_foreign_sets(collected: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no dataset\.json"):
        load(tmp_path)
    card = json.loads((collected / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps({**card, "action_dim": 6}))
    with pytest.raises(UserError, match="action_dim is 6, expected 7"):
        load(tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match="missing although"):
        load(tmp_path)
    images = tmp_path / "images"
    images.mkdir()
    for path in (collected / "images").iterdir():
        (images / path.name).write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="truncated or edited"):
        load(tmp_path)


def test_disturbed_every_init_state_makes_several_episodes() -> None:
    task = suite_tasks("libero_object")[0]
    once, again = (shuffled_episodes(replace(SMALL, action_noise=noise), task) for noise in (0.0, 0.5))
    assert sorted(once) == [0, 1, 2]
    assert again[:3] == once
    assert sorted(again) == list(range(3 * ROUNDS))
    assert sorted(SMALL.init_state_id(number) for number in again[3:6]) == [0, 1, 2]


def runs(process: str) -> bool:
    """Whether a process exists and is more than a zombie waiting to be reaped."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_collection_leaves_no_process_and_goes_on_with_fewer(collected: Path, tmp_path: Path) -> None:
    output = tmp_path / "resumed"
    script = (
        "import sys; from dataclasses import replace; from pathlib import Path\n"
        "from tests.test_expert import SMALL, collect\n"
        "if __name__ == '__main__': collect(replace(SMALL, episodes_per_task=2), Path(sys.argv[1]), workers=2)"
    )
    program = tmp_path / "program.py"
    program.write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen([sys.executable, str(program), str(output)], env=environment)
    parts = tmp_path / ".resumed.parts"
    deadline = time.monotonic() + 300
    while not list(parts.glob("*.npz")) and time.monotonic() < deadline:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(runs(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(runs(child) for child in children)
    assert not output.exists()
    assert list(parts.glob("*.npz"))
    assert (parts / "fingerprint").read_text() == parts_fingerprint(SMALL)
    card = collect(SMALL, output, workers=2)
    assert card == json.loads((collected / "dataset.json").read_text())
