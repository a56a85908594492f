"""Collecting demonstrations: the scripted expert in parallel processes, only successes kept.

Which episodes are played depends on the seed alone: per task a shuffled list of init states, of which as many are
played as are wanted, then as many more as failed, until enough succeeded. Where the expert is disturbed, every init
state makes another episode in another round: the list then holds ROUNDS shuffles.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pi0rl.errors import UserError
from pi0rl.files import replace_directory
from pi0rl.libero.plan import init_states
from pi0rl.libero.suites import SUITES, Task, suite_tasks
from pi0rl.sft import demonstrations as layout
from pi0rl.sft.assembling import assemble, finished, open_parts, versions
from pi0rl.sft.recording import Collection
from pi0rl.sft.workers import WorkerPool

ROUNDS = 4


def collect(collection: Collection, output_dir: Path, workers: int) -> dict[str, Any]:
    """Collect demonstrations into ``output_dir`` and return the card; does nothing if they are already there.

    Raises:
        UserError: the expert cannot play a task or fails too often, or the folder holds something else.
    """
    tasks = _checked_tasks(collection)
    fingerprint = _fingerprint(asdict(collection))
    card = finished(output_dir, fingerprint)
    if card is not None:
        return card
    parts = open_parts(output_dir, parts_fingerprint(collection))
    with WorkerPool(workers, collection, parts) as pool:
        chosen = _play_until_enough(pool, collection, tasks)
    described = {"fingerprint": fingerprint, "collection": asdict(collection)}
    with replace_directory(output_dir) as folder:
        assemble(described, collection.camera_size, collection.image_stride, chosen, parts, folder)
    shutil.rmtree(parts)
    return layout.read_card(output_dir)


def _checked_tasks(collection: Collection) -> list[Task]:
    first, last = collection.init_state_ids
    if not 0 <= first < last:
        raise UserError(f"demos.init_state_ids [{first}, {last}]: expected the first and one past the last, as [0, 50]")
    available = _rounds(collection) * (last - first)
    if available < collection.episodes_per_task:
        more = "" if collection.action_noise else f", or set demos.action_noise: then a state makes up to {ROUNDS}"
        raise UserError(
            f"demos: {collection.episodes_per_task} episodes per task out of {available} from {last - first} init "
            f"states; widen demos.init_state_ids, ask for fewer{more}"
        )
    tasks = [task for suite in collection.suites for task in suite_tasks(suite)]
    for task in tasks:
        states = len(init_states(task, collection.split))
        if last > states:
            raise UserError(f"demos.init_state_ids up to {last}: {task.suite} task {task.task_id} has only {states}")
    return tasks


def _play_until_enough(pool: WorkerPool, collection: Collection, tasks: Sequence[Task]) -> list[tuple[Task, list[int]]]:
    """The numbers of the successful episodes of every task."""
    orders = [shuffled_episodes(collection, task) for task in tasks]
    tried = [0] * len(tasks)
    successes: list[list[int]] = [[] for _ in tasks]
    while True:
        units = []
        for index, task in enumerate(tasks):
            wanted = collection.episodes_per_task - len(successes[index])
            candidates = orders[index][tried[index] : tried[index] + wanted]
            if len(candidates) < wanted:
                raise UserError(
                    f"{task.suite} task {task.task_id} ({task.language!r}): the expert succeeded in "
                    f"{len(successes[index])} of {tried[index]} episodes, {collection.episodes_per_task} "
                    "were asked for; ask for fewer, give more init states or less action noise"
                )
            tried[index] += len(candidates)
            if candidates:
                units.append((task, candidates))
        if not units:
            return list(zip(tasks, successes, strict=True))
        for task, number, success in pool.play(units):
            if success:
                successes[tasks.index(task)].append(number)


def _rounds(collection: Collection) -> int:
    return ROUNDS if collection.action_noise else 1


def shuffled_episodes(collection: Collection, task: Task) -> list[int]:
    """Episode numbers, as :meth:`Collection.init_state_id` reads them: one round after the other, each shuffled."""
    rng = np.random.default_rng([collection.seed, SUITES.index(task.suite), task.task_id])
    first, last = collection.init_state_ids
    rounds = [rng.permutation(np.arange(first, last)) + each * (last - first) for each in range(_rounds(collection))]
    return [int(number) for number in np.concatenate(rounds)]


def parts_fingerprint(collection: Collection) -> str:
    """Of what an episode depends on: who asked for too many goes on with fewer."""
    return _fingerprint({key: value for key, value in asdict(collection).items() if key != "episodes_per_task"})


def _fingerprint(described: dict[str, Any]) -> str:
    text = json.dumps({**described, "versions": versions()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
