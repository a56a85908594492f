"""A whole evaluation: episodes of one suite at their step limit, a look every 10 steps, one process per core."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pi0rl.libero.plan import Episode, evaluation_plan
from pi0rl.libero.slots import SlotConfig, Slots
from pi0rl.progress import Progress

CHUNK = 10
SLOTS = 4


@dataclass(frozen=True)
class EvaluationTime:
    """How long the episodes took.

    Attributes:
        episodes, control_steps: What was played, settling not counted.
        processes: How many processes played.
        wall_seconds: From the first process's start to the last one's end.
        cpu_seconds: Of all processes together.
        busy: The share of the processes' wall time in which they had a core.
    """

    episodes: int
    control_steps: int
    processes: int
    wall_seconds: float
    cpu_seconds: float
    busy: float


def time_evaluation(suite: str, episodes_per_task: int, camera_size: int, processes: int) -> EvaluationTime:
    """Play the first official init states of every task under random actions, in the fast profile."""
    plan = evaluation_plan([suite], "official", episodes_per_task, seed=0)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    started = time.monotonic()
    # Whole tasks side by side: a process loads the models of its own rows only.
    shares = [plan[len(plan) * index // processes : len(plan) * (index + 1) // processes] for index in range(processes)]
    workers = [context.Process(target=_play, args=(share, camera_size, queue), daemon=True) for share in shares]
    for worker in workers:
        worker.start()
    progress, finished, steps, cpu = Progress("evaluation", len(plan), "episode"), 0, 0, 0.0
    while finished < len(plan):
        count, played, seconds = queue.get()
        finished, steps, cpu = finished + count, steps + played, cpu + seconds
        progress.update(finished)
    for worker in workers:
        worker.join()
    wall = time.monotonic() - started
    return EvaluationTime(len(plan), steps, processes, wall, cpu, cpu / (wall * processes))


def _play(rows: Sequence[Episode], camera_size: int, queue: Any) -> None:
    """Reports (episodes, control steps, CPU seconds) since the last report."""
    config = SlotConfig(camera_size, "fast", settle_steps=10, max_episode_steps=None)
    slots = Slots(SLOTS, config)
    look = slots.start(rows)
    reported = reported_steps = 0
    reported_seconds = 0.0
    while look.running:
        look = slots.step(_random_chunks(look.episode, look.chunk))
        if len(slots.results) > reported:
            steps, seconds = sum(result.steps for result in slots.results), time.process_time()
            queue.put((len(slots.results) - reported, steps - reported_steps, seconds - reported_seconds))
            reported, reported_steps, reported_seconds = len(slots.results), steps, seconds


def _random_chunks(episode: np.ndarray, chunk: np.ndarray) -> np.ndarray:
    """float64 [M, C, 7], keyed by episode and chunk."""
    keys = zip(np.maximum(episode, 0).tolist(), chunk.tolist(), strict=True)
    return np.stack([np.random.default_rng(key).uniform(-1.0, 1.0, (CHUNK, 7)) for key in keys])
