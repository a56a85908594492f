"""Playing and recording one episode of the scripted expert."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from pi0rl.libero.expert import Expert
from pi0rl.libero.plan import Split, init_states
from pi0rl.libero.rendering import Renderer
from pi0rl.libero.simulation import Simulation
from pi0rl.libero.suites import SUITES, Task
from pi0rl.sft.demonstrations import CAMERAS

# Disturbances come in bursts, with time between them in which to watch how the expert comes back.
BURST_STEPS, BURST_PERIOD = 6, 24


@dataclass(frozen=True)
class Collection:
    """What to collect; together with the installed versions it decides every byte.

    Attributes:
        suites: names of the suites, all their tasks.
        episodes_per_task: successful episodes wanted.
        init_state_ids: first (included) and last (excluded) init state to choose from.
        split: which init states.
        seed: for the choice of init states and the disturbances.
        camera_size: pixels of the square images.
        render_profile: a key of ``PROFILES``.
        image_stride: control steps between images.
        settle_steps: no-op steps after a reset.
        scene_seed: where LIBERO puts the fixtures.
        action_noise: standard deviation of the disturbance of the executed action in bursts of 6 of every 24 steps,
            which begin somewhere else in every episode (``Expert.disturb``); 0 for none.
    """

    suites: tuple[str, ...]
    episodes_per_task: int
    init_state_ids: tuple[int, int]
    seed: int
    camera_size: int
    split: Split = "official"
    render_profile: Literal["reference", "fast"] = "fast"
    image_stride: int = 1
    settle_steps: int = 10
    scene_seed: int = 0
    action_noise: float = 0.0

    def init_state_id(self, number: int) -> int:
        """Where an episode begins. Numbers are init states; beyond the last one they go on with the first."""
        first, last = self.init_state_ids
        return first + (number - first) % (last - first)


@dataclass(frozen=True)
class Recording:
    """One played episode: T steps, L looks; arrays are empty if the expert failed.

    Attributes:
        disturbed: bool [T], whether something else than ``action`` was executed; None where it never was.
    """

    success: bool
    state: np.ndarray
    action: np.ndarray
    images: np.ndarray
    disturbed: np.ndarray | None = None


def play(simulation: Simulation, renderer: Renderer, collection: Collection, number: int) -> Recording:
    """Play an episode, by its number in the collection, with the expert until success or the task's step limit."""
    task = simulation.task
    rng = np.random.default_rng([collection.seed, SUITES.index(task.suite), task.task_id, number])
    simulation.reset(init_states(task, collection.split)[collection.init_state_id(number)], collection.settle_steps)
    expert = Expert(simulation, rng)
    states, actions, images, disturbed = [], [], [], []
    noise = collection.action_noise
    phase = int(rng.integers(BURST_PERIOD)) if noise else 0
    for step in range(task.max_episode_steps):
        states.append(simulation.state())
        if step % collection.image_stride == 0:
            shown = simulation.render_state()
            images.append([renderer.render(task, collection.scene_seed, shown, camera) for camera in CAMERAS])
        action = expert.action()
        actions.append(action.astype(np.float32))
        disturbed.append(noise > 0 and (step + phase) % BURST_PERIOD < BURST_STEPS)
        if simulation.step(expert.disturb(action, noise) if disturbed[-1] else actions[-1]):
            flags = np.array(disturbed) if noise else None
            return Recording(True, np.stack(states), np.stack(actions), np.array(images), flags)
    empty = np.zeros(0, np.float32)
    return Recording(False, empty, empty, empty)


def part_name(task: Task, number: int) -> str:
    """File name of one played episode in the ``.parts`` folder."""
    return f"{task.suite}_{task.task_id}_{number}.npz"


def save_part(recording: Recording, path: Path) -> None:
    """Write a played episode so that the file is either whole or not there."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        flags = {} if recording.disturbed is None else {"disturbed": recording.disturbed}
        np.savez(
            file,
            allow_pickle=False,
            success=recording.success,
            state=recording.state,
            action=recording.action,
            images=recording.images,
            **flags,
        )
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
