"""Sets of demonstrations made on the spot, and what tests do with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pi0rl.cli import main
from pi0rl.libero.suites import suite_tasks
from pi0rl.sft.assembling import assemble
from pi0rl.sft.importing import Import
from pi0rl.sft.recording import Recording, part_name, save_part

SUITE, SIZE = "libero_goal", 32
LENGTHS = (5, 7)  # of the two episodes of every task


def episode(seed: int, length: int, size: int = SIZE) -> Recording:
    """Smooth pictures, brighter step by step and darker to one corner, so that any wrong turn or shift shows."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(20, 150, size)
    picture = ramp[:, None, None] + 0.3 * ramp[None, :, None] + np.array([0, 20, 40])
    steps = picture + 4.0 * np.arange(length)[:, None, None, None]
    images = np.stack([steps, 250 - steps], axis=1).astype(np.uint8)
    state = rng.normal(size=(length, 8)).astype(np.float32)
    return Recording(True, state, rng.uniform(-1, 1, size=(length, 7)).astype(np.float32), images)


def noise_to_imitate(rng: np.random.Generator) -> Recording:
    """A short episode with pictures as the tiny policy takes them."""
    state = rng.normal(size=(5, 8)).astype(np.float32)
    images = rng.integers(0, 256, (5, 2, 64, 64, 3), dtype=np.uint8)
    return Recording(True, state, np.tanh(state[:, :7]), images)


def make_demonstrations(folder: Path) -> Path:
    """Two short episodes of noise of every task, in a folder below ``folder``."""
    rng = np.random.default_rng(0)
    return assembled(folder, lambda task_id, number: noise_to_imitate(rng), size=64)


def write_own(folder: Path, disturbed: Sequence[np.ndarray | None], action_noise: float) -> Path:
    """Two episodes of every task, of LENGTHS steps, disturbed as said, in a folder below ``folder``."""

    def recording(task_id: int, number: int) -> Recording:
        return replace(episode(10 * task_id + number, LENGTHS[number]), disturbed=disturbed[number])

    return assembled(folder, recording, SIZE, action_noise)


def assembled(folder: Path, recording: Callable[[int, int], Recording], size: int, action_noise: float = 0.0) -> Path:
    """A set of two recordings (of task id and number) of every task."""
    parts, demos = folder / "parts", folder / "demos"
    parts.mkdir()
    demos.mkdir()
    tasks = suite_tasks(SUITE)
    for task in tasks:
        for number in range(2):
            save_part(recording(task.task_id, number), parts / part_name(task, number))
    made = {"action_noise": action_noise, "split": "official", "seed": 0}
    described = {"fingerprint": "0" * 16, "collection": made}
    assemble(described, size, 1, [(task, [0, 1]) for task in tasks], parts, demos)
    return demos


def refusal(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line in which looking at a set ends."""
    assert main(["dataset", "inspect", str(folder)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("pi0rl: error: ")
    assert said.count("\n") == 1
    return said


def request(source: Path, **changes: Any) -> Import:
    usual = {"fps": 20, "suites": (SUITE,), "camera_size": SIZE, "episodes_per_task": 2}
    return Import(str(source), **(usual | changes))
