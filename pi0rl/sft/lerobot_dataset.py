"""Reading LeRobotDatasets (v3: Parquet and video or embedded images) of LIBERO episodes.

Such sets hold upright images, so each is turned by 180 degrees to what LIBERO renders.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pi0rl.errors import UserError
from pi0rl.libero.video import decode
from pi0rl.sft.demonstrations import ACTION_DIM, STATE_DIM, file_digest
from pi0rl.sft.sources import SourceEpisode

INFO, TASKS = "meta/info.json", "meta/tasks.parquet"
# The names in use for LIBERO: LeRobot's own, openpi's, and those of the Open X conversions.
BASE_KEYS = ("observation.images.image", "observation.images.agentview", "image")
WRIST_KEYS = ("observation.images.image2", "observation.images.wrist_image", "wrist_image")
STATE_KEYS, ACTION_KEYS = ("observation.state", "state"), ("action", "actions")
IMAGE_KINDS = ("video", "image")


class LerobotDataset:
    """A local LeRobotDataset; an :class:`~pi0rl.sft.sources.EpisodeSource`.

    Args:
        directory: with ``meta/info.json``.
        fps: what it has to say of itself. LIBERO's control steps are 20 a second; sets that were converted by openpi's
            and LeRobot's scripts say 10 of the same steps.

    Raises:
        UserError: it is of another version, frequency, or shape.
    """

    def __init__(self, directory: Path, fps: int):
        self.name = str(directory)
        self._directory = directory
        self._info = _read_info(directory / INFO)
        _check_info(directory / INFO, self._info, fps)
        features = self._info["features"]
        self._base, self._wrist, self._state, self._action = (
            _feature(directory / INFO, features, keys, shape)
            for keys, shape in (
                (BASE_KEYS, None),
                (WRIST_KEYS, None),
                (STATE_KEYS, [STATE_DIM]),
                (ACTION_KEYS, [ACTION_DIM]),
            )
        )
        self._episodes = self._read_episodes()
        self.instructions = tuple(self._instructions())
        self.described = {
            "format": "lerobot",
            "codebase_version": self._info["codebase_version"],
            "fps": self._info["fps"],
            "info_sha256": file_digest(directory / INFO),
        }

    def read(self, episode: int) -> SourceEpisode:
        row = self._episodes[episode]
        rows = self._rows(row)
        images = [self._images(key, row, rows) for key in (self._base, self._wrist)]
        return SourceEpisode(
            state=_matrix(rows[self._state]),
            actions=_matrix(rows[self._action]),
            base_image=images[0][:, ::-1, ::-1],
            wrist_image=images[1][:, ::-1, ::-1],
        )

    def _read_episodes(self) -> list[dict[str, Any]]:
        folder = self._directory / "meta/episodes"
        files = sorted(folder.glob("*/*.parquet"))
        if not files:
            raise UserError(f"{folder}: no Parquet files of episodes; download the whole data set")
        rows = [row for file in files for row in _read_table(file).to_pylist()]
        return sorted(rows, key=lambda row: row["episode_index"])

    def _instructions(self) -> list[str]:
        path = self._directory / TASKS
        by_index = {index: str(text) for text, index in _read_table(path).to_pandas()["task_index"].items()}
        named = [list(episode["tasks"]) for episode in self._episodes]
        ambiguous = next((index for index, tasks in enumerate(named) if len(tasks) != 1), None)
        if ambiguous is not None:
            raise UserError(
                f"{path}: episode {ambiguous} has {len(named[ambiguous])} instructions, expected one; split it"
            )
        known = set(by_index.values())
        unknown = next((tasks[0] for tasks in named if tasks[0] not in known), None)
        if unknown is not None:
            raise UserError(f"{path}: does not list the instruction {unknown!r} of an episode; download it again")
        return [tasks[0] for tasks in named]

    def _rows(self, episode: dict[str, Any]) -> dict[str, pa.ChunkedArray]:
        path = self._directory / self._info["data_path"].format(
            chunk_index=episode["data/chunk_index"], file_index=episode["data/file_index"]
        )
        columns = [key for key in (self._state, self._action, self._base, self._wrist) if self._stored(key)]
        table = _read_table(path, columns, [("episode_index", "==", int(episode["episode_index"]))])
        if len(table) != episode["length"]:
            raise UserError(
                f"{path}: {len(table)} steps of episode {episode['episode_index']}, but meta/episodes says "
                f"{episode['length']}; download the file again"
            )
        return {name: table[name] for name in columns}

    def _stored(self, key: str) -> bool:
        return self._info["features"][key]["dtype"] != "video"

    def _images(self, key: str, episode: dict[str, Any], rows: dict[str, pa.ChunkedArray]) -> np.ndarray:
        if self._stored(key):
            return np.stack([np.asarray(Image.open(io.BytesIO(cell["bytes"]))) for cell in rows[key].to_pylist()])
        path = self._directory / self._info["video_path"].format(
            video_key=key,
            chunk_index=episode[f"videos/{key}/chunk_index"],
            file_index=episode[f"videos/{key}/file_index"],
        )
        start = round(episode[f"videos/{key}/from_timestamp"] * self._info["fps"])
        return decode(path, _frame_size(self._info["features"][key]), self._info["fps"], start, int(episode["length"]))


def _read_info(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); download the data set again") from error


def _check_info(path: Path, info: dict[str, Any], fps: int) -> None:
    version = str(info.get("codebase_version"))
    if not version.startswith("v3."):
        raise UserError(
            f"{path}: codebase_version is {version}, expected v3.x; convert it with LeRobot's "
            "lerobot.datasets.v30.convert_dataset_v21_to_v30"
        )
    if info.get("fps") != fps:
        raise UserError(
            f"{path}: fps is {info.get('fps')}, expected {fps}; if its frames are LIBERO's control steps all the same "
            f"(openpi's and LeRobot's conversions say 10), set demos.dataset.fps: {info.get('fps')}"
        )
    missing = [key for key in ("features", "data_path") if key not in info]
    if missing:
        raise UserError(f"{path}: key {missing[0]} is missing; download the data set again")


def _feature(path: Path, features: dict[str, Any], keys: Sequence[str], shape: list[int] | None) -> str:
    """The one of ``keys`` that the set has: a vector of ``shape``, or a camera where there is none."""
    found = next((key for key in keys if key in features), None)
    if found is None:
        raise UserError(f"{path}: no feature {' or '.join(keys)}; it has {', '.join(features)}")
    feature = features[found]
    if shape is not None and list(feature["shape"]) != shape:
        raise UserError(f"{path}: {found} has shape {feature['shape']}, expected LIBERO's {shape}")
    if shape is None and (feature["dtype"] not in IMAGE_KINDS or len(feature["shape"]) != 3):
        raise UserError(
            f"{path}: {found} is {feature['dtype']} {feature['shape']}, expected a video or image [h, w, 3]"
        )
    return found


def _frame_size(feature: dict[str, Any]) -> tuple[int, int]:
    """Height and width of a camera's pictures, whose shape is given as [h, w, 3] or [3, h, w]."""
    sides = feature["shape"][1:] if feature["shape"][0] == 3 else feature["shape"][:2]
    return sides[0], sides[1]


def _read_table(path: Path, columns: list[str] | None = None, filters: list[tuple] | None = None) -> pa.Table:
    if not path.is_file():
        raise UserError(f"{path}: not found; download the whole data set")
    try:
        return pq.read_table(path, columns=columns, filters=filters)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: truncated or not Parquet ({reason}); download the file again") from error


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    return np.array(column.to_pylist(), np.float32).reshape(len(column), -1)
