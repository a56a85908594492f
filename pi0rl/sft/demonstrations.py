"""A set of demonstrations on disk: what is in it, and reading it with every check.

A folder holds ``dataset.json`` (the card), ``steps.parquet`` (one row per control step) and ``images/`` with one
``.npy`` per task, uint8 [looks, 2, S, S, 3]: base and wrist camera at every ``image_stride``-th step of an episode.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pi0rl.errors import UserError
from pi0rl.observation import Observation

FORMAT = "pi0rl-demonstrations"
FORMAT_VERSION = 1
FPS = 20
CAMERAS = ("agentview", "robot0_eye_in_hand")
STATE_DIM, ACTION_DIM = 8, 7
CARD_NAME, STEPS_NAME, IMAGES_NAME = "dataset.json", "steps.parquet", "images"
# What every set of this format has in common; anything else is refused.
LAYOUT = {
    "format": FORMAT,
    "format_version": FORMAT_VERSION,
    "fps": FPS,
    "cameras": list(CAMERAS),
    "state_dim": STATE_DIM,
    "action_dim": ACTION_DIM,
}
# What a card says of its own set beside that.
CARD_KEYS: dict[str, type] = {
    "fingerprint": str,
    "files": dict,
    "tasks": list,
    "episodes": list,
    "steps": int,
    "image_size": int,
    "image_stride": int,
    "norm_stats": dict,
}
STATISTICS = ("mean", "std", "q01", "q99")


@dataclass(frozen=True)
class Demonstrations:
    """N control steps of successful episodes, one after the other, and M looks (steps that have images).

    Attributes:
        base_image, wrist_image: uint8 [M, S, S, 3], as LIBERO renders (not rotated).
        looks: int64 [M], the step of each image pair; all steps when the set was collected with image stride 1.
        state: float32 [N, 8], before the action: end-effector position (m), axis-angle (rad), finger joints (m).
        actions: float32 [N, 7], what the expert wanted at that step, in the environment's units, in [-1, 1].
        episode: int32 [N], ascending number of the episode.
        step: int32 [N], control step within the episode.
        task: int32 [N], index into ``languages``.
        disturbed: bool [N], whether something else than the action was executed.
        languages: the instructions, one per task.
        card: the whole ``dataset.json``, with the statistics under ``norm_stats``.
    """

    base_image: np.ndarray
    wrist_image: np.ndarray
    looks: np.ndarray
    state: np.ndarray
    actions: np.ndarray
    episode: np.ndarray
    step: np.ndarray
    task: np.ndarray
    disturbed: np.ndarray
    languages: tuple[str, ...]
    card: dict[str, Any]

    def __len__(self) -> int:
        return len(self.state)

    def observation(self, steps: np.ndarray) -> Observation:
        """What the policy would have seen at these steps (int [B]); each must be one of ``looks``.

        Raises:
            UserError: a step has no images.
        """
        rows = np.minimum(np.searchsorted(self.looks, steps), len(self.looks) - 1)
        if not np.array_equal(self.looks[rows], steps):
            raise UserError(
                f"demonstrations with images at every {self.card['image_stride']} steps: asked for a step without "
                "images; choose steps from `looks`, or collect with image stride 1"
            )
        prompts = tuple(self.languages[task] for task in self.task[steps])
        return Observation(self.base_image[rows], self.wrist_image[rows], self.state[steps], prompts)


@dataclass(frozen=True)
class Steps:
    """What is known of all N control steps but their images; as in :class:`Demonstrations`."""

    state: np.ndarray
    actions: np.ndarray
    episode: np.ndarray
    step: np.ndarray
    task: np.ndarray
    disturbed: np.ndarray


def read_steps(directory: Path, card: dict[str, Any]) -> Steps:
    """The steps of a set.

    Raises:
        UserError: they are not as many as the card says.
    """
    table = pq.read_table(directory / STEPS_NAME)
    if len(table) != card["steps"]:
        raise UserError(f"{directory}: {CARD_NAME} has {card['steps']} steps, {STEPS_NAME} {len(table)}; collect again")
    return Steps(
        state=matrix(table["state"], STATE_DIM),
        actions=matrix(table["action"], ACTION_DIM),
        episode=table["episode"].to_numpy(),
        step=table["step"].to_numpy(),
        task=table["task"].to_numpy(),
        disturbed=table["disturbed"].to_numpy() if "disturbed" in table.column_names else np.zeros(len(table), bool),
    )


def load(directory: Path) -> Demonstrations:
    """Read a set of demonstrations, all of it into memory, and verify every file against the card.

    Raises:
        UserError: the folder holds no such set, one of another layout, or a damaged or incomplete one.
    """
    card = read_card(directory)
    found = damage(directory, card)
    if found is not None:
        raise UserError(f"{found}; collect the demonstrations again")
    steps = read_steps(directory, card)
    images = [np.load(directory / image_name(task["suite"], task["task_id"])) for task in card["tasks"]]
    looks = np.flatnonzero(steps.step % card["image_stride"] == 0)
    if sum(len(pictures) for pictures in images) != len(looks):
        raise UserError(f"{directory}: {STEPS_NAME} and images disagree in number; collect again")
    return Demonstrations(
        base_image=np.concatenate([pictures[:, 0] for pictures in images]),
        wrist_image=np.concatenate([pictures[:, 1] for pictures in images]),
        looks=looks,
        state=steps.state,
        actions=steps.actions,
        episode=steps.episode,
        step=steps.step,
        task=steps.task,
        disturbed=steps.disturbed,
        languages=tuple(task["language"] for task in card["tasks"]),
        card=card,
    )


def split(demonstrations: Demonstrations, per_task: int | None, held_out: int) -> tuple[Demonstrations, Demonstrations]:
    """The first ``per_task`` episodes of every task (None: all but those held out), and its last ``held_out`` ones.

    Raises:
        UserError: a task has too few episodes for both.
    """
    first, last = [], []
    for task, language in enumerate(demonstrations.languages):
        episodes = np.unique(demonstrations.episode[demonstrations.task == task])
        wanted = max(1, len(episodes) - held_out) if per_task is None else per_task
        if len(episodes) < wanted + held_out:
            raise UserError(
                f"demonstrations of {language!r}: {len(episodes)} episodes, {wanted} to train on and {held_out} held "
                "out were asked for; set demos.episodes_per_task higher, or sft.demos_per_task and "
                "sft.val_demos_per_task lower"
            )
        first.append(episodes[:wanted])
        last.append(episodes[len(episodes) - held_out :])
    return _only(demonstrations, np.concatenate(first)), _only(demonstrations, np.concatenate(last))


def _only(demonstrations: Demonstrations, episodes: np.ndarray) -> Demonstrations:
    """Some episodes of a set, and their statistics; the set itself if it is all of them."""
    kept = np.isin(demonstrations.episode, episodes)
    if kept.all() or not kept.any():
        return demonstrations if kept.all() else replace(demonstrations, looks=demonstrations.looks[:0])
    looks = kept[demonstrations.looks]
    state, actions = demonstrations.state[kept], demonstrations.actions[kept]
    statistics = {"state": normalisation(state), "actions": normalisation(actions)}
    return Demonstrations(
        base_image=demonstrations.base_image[looks],
        wrist_image=demonstrations.wrist_image[looks],
        looks=np.searchsorted(np.flatnonzero(kept), demonstrations.looks[looks]),
        state=state,
        actions=actions,
        episode=demonstrations.episode[kept],
        step=demonstrations.step[kept],
        task=demonstrations.task[kept],
        disturbed=demonstrations.disturbed[kept],
        languages=demonstrations.languages,
        card=demonstrations.card | {"norm_stats": statistics},
    )


def damage(directory: Path, card: dict[str, Any]) -> str | None:
    """What is wrong with the first file that does not match the card, or None if all are as they were written."""
    for name, digest in card["files"].items():
        path = directory / name
        if not path.is_file():
            return f"{path}: missing although {CARD_NAME} lists it"
        if file_digest(path) != digest:
            return f"{path}: content differs from {CARD_NAME}'s sha256 (truncated or edited)"
    return None


def read_card(directory: Path) -> dict[str, Any]:
    """The card of a set of demonstrations, its layout checked.

    Raises:
        UserError: there is no card, or it describes something else.
    """
    path = directory / CARD_NAME
    if not path.is_file():
        raise UserError(f"{directory}: no {CARD_NAME}; expected a folder that `pi0rl demos` has completed")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); remove the folder and collect again") from error
    for key, expected in LAYOUT.items():
        found = card.get(key) if isinstance(card, dict) else None
        if found != expected:
            raise UserError(f"{path}: {key} is {found!r}, expected {expected!r}; this reader takes no other layout")
    for key, kind in CARD_KEYS.items():
        if not isinstance(card.get(key), kind):
            raise UserError(f"{path}: {key} is missing or not {kind.__name__}; collect again")
    for key, width in (("state", STATE_DIM), ("actions", ACTION_DIM)):
        _check_statistics(path, key, card["norm_stats"].get(key), width)
    return card


def _check_statistics(path: Path, key: str, statistics: Any, width: int) -> None:
    for name in STATISTICS:
        values = statistics.get(name) if isinstance(statistics, dict) else None
        numbers = values if isinstance(values, list) and all(isinstance(v, int | float) for v in values) else []
        if len(numbers) != width or not np.isfinite(numbers).all():
            raise UserError(
                f"{path}: norm_stats.{key}.{name} is missing or not {width} finite numbers, nothing can be normalised; "
                "collect again"
            )


def normalisation(values: np.ndarray) -> dict[str, list[float]]:
    """Mean, population standard deviation and 1 % and 99 % quantiles per column, as in openpi's norm_stats.json."""
    values = values.astype(np.float64)
    rows = (values.mean(axis=0), values.std(axis=0), *np.quantile(values, [0.01, 0.99], axis=0))
    return {name: [float(number) for number in row] for name, row in zip(STATISTICS, rows, strict=True)}


def steps_table(columns: dict[str, np.ndarray]) -> pa.Table:
    """The arrays of all steps as an Arrow table; matrices become fixed-size lists."""
    arrays = {}
    for name, values in columns.items():
        flat = pa.array(values.reshape(-1))
        arrays[name] = flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    return pa.table(arrays)


def image_name(suite: str, task_id: int) -> str:
    """Where the images of a task are, relative to the folder."""
    return f"{IMAGES_NAME}/{suite}_{task_id}.npy"


def file_digest(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def matrix(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """The fixed-size lists of a column as [n, width]."""
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
