"""Taking over demonstrations that exist already: LeRobotDatasets and LIBERO's HDF5 files, into a set of our own.

Images are brought to the experiment's size, instructions are matched with the tasks of its suites, statistics are
computed once. What comes after cannot tell who played the episodes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pi0rl.errors import UserError
from pi0rl.files import replace_directory
from pi0rl.libero.suites import Task, suite_tasks
from pi0rl.policy.processing import resize_pil
from pi0rl.policy.sources import hub_dataset
from pi0rl.progress import Progress
from pi0rl.sft.assembling import assemble, finished, open_parts, versions
from pi0rl.sft.demonstrations import CARD_NAME, FORMAT, damage, read_card
from pi0rl.sft.lerobot_dataset import INFO, LerobotDataset
from pi0rl.sft.recording import Recording, part_name, save_part
from pi0rl.sft.sources import EpisodeSource


@dataclass(frozen=True)
class Import:
    """What to take over; with the source's own digests it decides every byte.

    Attributes:
        source: a folder, or a hub id ``org/name@revision``.
        fps: what a LeRobotDataset has to say of itself.
        suites: whose tasks are wanted; episodes of other tasks are left out.
        episodes_per_task: at most; the first ones of every task.
        camera_size: pixels of the square images to make.
    """

    source: str
    fps: int
    suites: tuple[str, ...]
    episodes_per_task: int
    camera_size: int


def import_demonstrations(wanted: Import, output_dir: Path) -> dict[str, Any]:
    """Make a set of demonstrations in ``output_dir`` and return the card; does nothing if it is already there.

    Raises:
        UserError: the source is not there, is of no format that is read, or lacks a task.
    """
    directory, commit = _found(wanted.source)
    source = open_source(directory, wanted.fps)
    chosen = choose(source, wanted.suites, wanted.episodes_per_task)
    described = source.described([number for _, numbers in chosen for number in numbers])
    made_from = {"import": asdict(wanted), "source": described}
    text = json.dumps({**made_from, "versions": versions()}, sort_keys=True)
    fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
    card = finished(output_dir, fingerprint)
    if card is not None:
        return card
    parts = open_parts(output_dir, fingerprint)
    total = sum(len(numbers) for _, numbers in chosen)
    progress, done = Progress("demos", total, "episode"), 0
    for task, numbers in chosen:
        for number in numbers:
            path = parts / part_name(task, number)
            if not path.exists():
                save_part(_recording(source, number, wanted.camera_size), path)
            done += 1
            progress.update(done, taken(source, chosen) if done == total else task.language)
    made_from["source"] |= {} if commit is None else {"commit": commit}  # the digests decide, not the commit
    with replace_directory(output_dir) as folder:
        assemble({"fingerprint": fingerprint, **made_from}, wanted.camera_size, 1, chosen, parts, folder)
    shutil.rmtree(parts)
    return read_card(output_dir)


def _found(source: str) -> tuple[Path, str | None]:
    """The folder of a set, and the commit of one on the hub."""
    if Path(source).is_dir():
        return Path(source), None
    directory = hub_dataset(source)
    return directory, directory.name  # of a snapshot in the hub's cache


def open_source(directory: Path, fps: int) -> EpisodeSource:
    """The set of demonstrations in a folder, by what its files are.

    Raises:
        UserError: nothing there that can be read, or no episode.
    """
    if (directory / INFO).is_file():
        source = LerobotDataset(directory, fps)
    elif any(directory.glob("*_demo.hdf5")):
        from pi0rl.sft.libero_hdf5 import LiberoHdf5

        source = LiberoHdf5(directory)
    else:
        raise UserError(
            f"{directory}: neither a LeRobotDataset ({INFO}) nor LIBERO's HDF5 files (*_demo.hdf5); name the folder "
            "that holds them"
        )
    if not source.instructions:
        raise UserError(f"{directory}: no episodes; download the whole data set")
    return source


def inspect(source: str, fps: int) -> list[str]:
    """What a set of demonstrations holds, in lines; its own or another's format."""
    if (Path(source) / CARD_NAME).is_file():
        card = read_card(Path(source))
        found = damage(Path(source), card)
        counts = Counter(card["tasks"][episode["task"]]["language"] for episode in card["episodes"])
        first = f"{FORMAT}, {card['steps']} steps, images of {card['image_size']} pixels every {card['image_stride']}"
        return [f"{source}: {first}", f"files: {found or 'as they were written'}", *_counted(counts)]
    opened = open_source(_found(source)[0], fps)
    episode = opened.read(0)
    height, width = episode.base_image.shape[1:3]
    shown = f"{len(episode.state)} steps with images of {width} x {height} pixels"
    return [
        f"{source}: {opened.format}",
        f"first episode: {episode.problem() or shown}",
        *_counted(Counter(opened.instructions)),
    ]


def _counted(instructions: Counter[str]) -> list[str]:
    total = sum(instructions.values())
    return [f"{total} episodes, {len(instructions)} instructions"] + [
        f"{count:6}  {instruction}" for instruction, count in instructions.items()
    ]


def choose(source: EpisodeSource, suites: Sequence[str], episodes_per_task: int) -> list[tuple[Task, list[int]]]:
    """The first episodes of every task of the suites; where tasks share an instruction, the first task gets them.

    Raises:
        UserError: a task has no episode.
    """
    chosen: dict[str, tuple[Task, list[int]]] = {}
    for task in (task for suite in suites for task in suite_tasks(suite)):
        chosen.setdefault(task.language, (task, []))
    for number, instruction in enumerate(source.instructions):
        _, numbers = chosen.get(_normal(instruction), (None, []))
        if len(numbers) < episodes_per_task:
            numbers.append(number)
    lacking = next((task for task, numbers in chosen.values() if not numbers), None)
    if lacking is not None:
        raise UserError(
            f"{source.name}: no episode of {lacking.suite} task {lacking.task_id} ({lacking.language!r}) among its "
            f"{len(set(source.instructions))} instructions; choose the suites that it holds"
        )
    return list(chosen.values())


def taken(source: EpisodeSource, chosen: Sequence[tuple[Task, Sequence[int]]]) -> str:
    """How many of the source's episodes of the chosen tasks were taken, for people."""
    there = Counter(_normal(instruction) for instruction in source.instructions)
    few, many = _range([len(numbers) for _, numbers in chosen]), _range([there[task.language] for task, _ in chosen])
    limit = "" if few == many else " (demos.episodes_per_task)"
    return f"took {few} of {many} episodes per task{limit}"


def _range(counts: Sequence[int]) -> str:
    return str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def _normal(instruction: str) -> str:
    return " ".join(instruction.lower().strip().rstrip(".").split())


def _recording(source: EpisodeSource, number: int, size: int) -> Recording:
    episode = source.read(number)
    problem = episode.problem()
    if problem is not None:
        raise UserError(f"{source.name}: episode {number} has {problem}")
    cameras = [resize_pil(np.ascontiguousarray(images), size) for images in (episode.base_image, episode.wrist_image)]
    return Recording(True, episode.state, episode.actions, np.stack(cameras, axis=1), episode.disturbed)
