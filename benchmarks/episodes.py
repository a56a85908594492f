"""A whole evaluation: episodes of one suite, a look every 10 steps, one process per core.

Played by what the scripted expert did, so that nearly all end early, as under a policy that is worth evaluating; and
by random actions, which never succeed, so that every episode lasts to its step limit.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pi0rl.libero.expert import Expert
from pi0rl.libero.plan import Episode, evaluation_plan
from pi0rl.libero.simulation import Simulation
from pi0rl.libero.slots import SlotConfig, Slots
from pi0rl.libero.suites import official_init_states, suite_tasks, task
from pi0rl.progress import Progress

CHUNK = 10
SLOTS = 4
# Init states per task that the expert plays; its actions are repeated from them.
EXPERT_STATES = 5

# float64 [T, 7] by task and init state.
Actions = dict[tuple[int, int], np.ndarray]


@dataclass(frozen=True)
class EvaluationTime:
    """How long the episodes took.

    Attributes:
        episodes, successes, control_steps: What was played, settling not counted.
        processes: How many processes played.
        wall_seconds: From the first process's start to the last one's end.
        cpu_seconds: Of all processes together.
        busy: The share of the processes' wall time in which they had a core.
    """

    episodes: int
    successes: int
    control_steps: int
    processes: int
    wall_seconds: float
    cpu_seconds: float
    busy: float


def time_evaluation(
    suite: str, episodes_per_task: int, camera_size: int, processes: int, actions: Actions | None = None
) -> EvaluationTime:
    """Play official init states of every task in the fast profile.

    Args:
        suite: The suite.
        episodes_per_task: Episodes of each task.
        camera_size: Pixels of both images.
        processes: Processes that play.
        actions: What is done from which init state; None: random actions, from the first init states.
    """
    plan = evaluation_plan([suite], "official", episodes_per_task, seed=0)
    if actions:
        plan = tuple(replace(row, init_state_id=row.init_state_id % EXPERT_STATES) for row in plan)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    started = time.monotonic()
    # Of every task as many episodes as the other processes, since tasks differ in what a step costs.
    shares = [plan[index::processes] for index in range(processes)]
    arguments = [(share, camera_size, actions, queue) for share in shares]
    workers = [context.Process(target=_play, args=each, daemon=True) for each in arguments]
    for worker in workers:
        worker.start()
    progress = Progress("evaluation", len(plan), "episode")
    finished = succeeded = steps = 0
    cpu = 0.0
    while finished < len(plan):
        *counts, seconds = queue.get()
        finished, succeeded, steps = finished + counts[0], succeeded + counts[1], steps + counts[2]
        cpu += seconds
        progress.update(finished)
    for worker in workers:
        worker.join()
    wall = time.monotonic() - started
    return EvaluationTime(len(plan), succeeded, steps, processes, wall, cpu, cpu / (wall * processes))


def expert_actions(suite: str, processes: int) -> Actions:
    """What the scripted expert does from the first official init states of every task, until success or the limit."""
    keys = [(scene.task_id, state) for scene in suite_tasks(suite) for state in range(EXPERT_STATES)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return dict(zip(keys, pool.starmap(_expert_actions, [(suite, *key) for key in keys]), strict=True))


def _expert_actions(suite: str, task_id: int, init_state_id: int) -> np.ndarray:
    scene = task(suite, task_id)
    simulation = Simulation(scene)
    simulation.reset(official_init_states(scene)[init_state_id])
    expert = Expert(simulation, np.random.default_rng(0))
    actions: list[np.ndarray] = []
    while len(actions) < scene.max_episode_steps:
        actions.append(expert.action())
        if simulation.step(actions[-1]):
            break
    return np.stack(actions)


def _play(rows: Sequence[Episode], camera_size: int, actions: Actions | None, queue: Any) -> None:
    """Reports (episodes, successes, control steps, CPU seconds) since the last report."""
    by_index = {row.index: (row.task_id, row.init_state_id) for row in rows}
    config = SlotConfig(camera_size, "fast", settle_steps=10, max_episode_steps=None)
    slots = Slots(SLOTS, config)
    look = slots.start(rows)
    reported, reported_seconds = 0, 0.0
    while look.running:
        if actions is None:
            chunks = _random_chunks(look.episode, look.chunk)
        else:
            chunks = _recorded_chunks(look.episode, look.chunk, by_index, actions)
        look = slots.step(chunks)
        fresh = slots.results[reported:]
        if fresh:
            seconds = time.process_time()
            successes, steps = sum(result.success for result in fresh), sum(result.steps for result in fresh)
            queue.put((len(fresh), successes, steps, seconds - reported_seconds))
            reported, reported_seconds = len(slots.results), seconds


def _random_chunks(episode: np.ndarray, chunk: np.ndarray) -> np.ndarray:
    """float64 [M, C, 7], keyed by episode and chunk."""
    keys = zip(np.maximum(episode, 0).tolist(), chunk.tolist(), strict=True)
    return np.stack([np.random.default_rng(key).uniform(-1.0, 1.0, (CHUNK, 7)) for key in keys])


def _recorded_chunks(
    episode: np.ndarray, chunk: np.ndarray, by_index: dict[int, tuple[int, int]], actions: Actions
) -> np.ndarray:
    """float64 [M, C, 7] from what was recorded; zeros for idle slots and after its end."""
    chunks = np.zeros((len(episode), CHUNK, 7))
    for row, (index, number) in enumerate(zip(episode.tolist(), chunk.tolist(), strict=True)):
        if index in by_index:
            recorded = actions[by_index[index]][number * CHUNK :][:CHUNK]
            chunks[row, : len(recorded)] = recorded
    return chunks
