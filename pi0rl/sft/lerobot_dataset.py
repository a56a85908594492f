"""Reading LeRobotDatasets (v3: Parquet and video or embedded images) of LIBERO episodes.

Such sets hold upright images, so each is turned by 180 degrees to what LIBERO renders.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pi0rl.errors import UserError, first_line
from pi0rl.libero.video import decode
from pi0rl.sft.demonstrations import ACTION_DIM, STATE_DIM, file_digest, matrix
from pi0rl.sft.sources import SourceEpisode

INFO, TASKS = "meta/info.json", "meta/tasks.parquet"
# The names in use for LIBERO: LeRobot's own, openpi's, and those of the Open X conversions.
BASE_KEYS = ("observation.images.image", "observation.images.agentview", "image")
WRIST_KEYS = ("observation.images.image2", "observation.images.wrist_image", "wrist_image")
STATE_KEYS, ACTION_KEYS = ("observation.state", "state"), ("action", "actions")
IMAGE_KINDS = ("video", "image")
DISTURBED = "disturbed"  # of our own sets: the steps at which something else than the action was executed
EPISODE_COLUMNS = {
    "episode_index": pa.int64(),
    "tasks": pa.list_(pa.string()),
    "length": pa.int64(),
    "data/chunk_index": pa.int64(),
    "data/file_index": pa.int64(),
}
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


class LerobotDataset:
    """A local LeRobotDataset; an :class:`~pi0rl.sft.sources.EpisodeSource`.

    Args:
        directory: with ``meta/info.json``.
        fps: what it has to say of itself. LIBERO's control steps are 20 a second; sets that were converted by openpi's
            and LeRobot's scripts say 10 of the same steps.

    Raises:
        UserError: it is of another version, frequency, or shape, or its meta folder is not whole.
    """

    format = "lerobot"

    def __init__(self, directory: Path, fps: int):
        self.name = str(directory)
        self._directory = directory
        info = directory / INFO
        self._info = _read_info(info)
        _check_info(info, self._info, fps)
        self._features = self._info["features"]
        self._base, self._wrist, self._state, self._action = (
            _feature(info, self._features, keys, shape)
            for keys, shape in (
                (BASE_KEYS, None),
                (WRIST_KEYS, None),
                (STATE_KEYS, [STATE_DIM]),
                (ACTION_KEYS, [ACTION_DIM]),
            )
        )
        cameras = (self._base, self._wrist)
        self._videos = tuple(key for key in cameras if self._features[key]["dtype"] == "video")
        self._columns = {
            "episode_index": pa.int64(),
            self._state: pa.list_(pa.float32(), STATE_DIM),
            self._action: pa.list_(pa.float32(), ACTION_DIM),
            **{key: PICTURE for key in cameras if key not in self._videos},
            **({DISTURBED: pa.int64()} if DISTURBED in self._features else {}),
        }
        _check_path(info, self._info, "data_path", chunk_index=0, file_index=0)
        if self._videos:
            _check_path(info, self._info, "video_path", video_key=self._base, chunk_index=0, file_index=0)
        self._episode_files = sorted((directory / "meta/episodes").glob("*/*.parquet"))
        self._episodes = self._read_episodes()
        self.instructions = tuple(self._instructions())

    def described(self, episodes: Iterable[int]) -> dict[str, Any]:
        rows = [self._episodes[episode] for episode in episodes]
        files = {self._directory / INFO, self._directory / TASKS, *self._episode_files}
        files |= {self._data_file(row) for row in rows}
        files |= {self._video_file(key, row) for row in rows for key in self._videos}
        return {
            "format": self.format,
            "codebase_version": self._info["codebase_version"],
            "fps": self._info["fps"],
            "files": {
                path.relative_to(self._directory).as_posix(): file_digest(_present(path)) for path in sorted(files)
            },
        }

    def read(self, episode: int) -> SourceEpisode:
        row = self._episodes[episode]
        path = self._data_file(row)
        table = _read_table(path, self._columns, [("episode_index", "==", row["episode_index"])])
        if len(table) != row["length"]:
            raise UserError(
                f"{path}: {len(table)} steps of episode {row['episode_index']}, but meta/episodes says "
                f"{row['length']}; download the file again"
            )
        base, wrist = (self._images(key, row, table) for key in (self._base, self._wrist))
        return SourceEpisode(
            state=matrix(table[self._state], STATE_DIM),
            actions=matrix(table[self._action], ACTION_DIM),
            base_image=base[:, ::-1, ::-1],
            wrist_image=wrist[:, ::-1, ::-1],
            disturbed=table[DISTURBED].to_numpy() != 0 if DISTURBED in self._columns else None,
        )

    def _read_episodes(self) -> list[dict[str, Any]]:
        if not self._episode_files:
            raise UserError(f"{self._directory}/meta/episodes: no Parquet files; download the whole data set")
        columns = EPISODE_COLUMNS | {
            f"videos/{key}/{name}": kind
            for key in self._videos
            for name, kind in (
                ("chunk_index", pa.int64()),
                ("file_index", pa.int64()),
                ("from_timestamp", pa.float64()),
            )
        }
        rows = [row for file in self._episode_files for row in _read_table(file, columns).to_pylist()]
        for row in rows:
            if len(row["tasks"]) != 1 or row["length"] < 1:
                raise UserError(
                    f"{self._directory}/meta/episodes: episode {row['episode_index']} has {len(row['tasks'])} "
                    f"instructions and {row['length']} steps, expected one and one at least; take it out"
                )
        return sorted(rows, key=lambda row: row["episode_index"])

    def _instructions(self) -> list[str]:
        path = self._directory / TASKS
        table = _read_table(path)
        # LeRobot writes the instructions as the index of a table, which has had several names.
        texts = [column for column in table.columns if _is_text(column.type)]
        known = {text for column in texts for text in column.to_pylist()}
        named = [episode["tasks"][0] for episode in self._episodes]
        unknown = next((text for text in named if text not in known), None)
        if unknown is not None:
            raise UserError(
                f"{path}: does not list the instruction {unknown!r} of an episode in its columns "
                f"{', '.join(table.column_names)}; download it again"
            )
        return named

    def _data_file(self, row: dict[str, Any]) -> Path:
        place = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
        return self._directory / self._info["data_path"].format(**place)

    def _video_file(self, key: str, row: dict[str, Any]) -> Path:
        place = {name: row[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index")}
        return self._directory / self._info["video_path"].format(video_key=key, **place)

    def _images(self, key: str, row: dict[str, Any], table: pa.Table) -> np.ndarray:
        if key not in self._videos:
            return _pictures(f"{self._data_file(row)}: {key}, episode {row['episode_index']}", table[key])
        start = round(row[f"videos/{key}/from_timestamp"] * self._info["fps"])
        size = _frame_size(self._features[key])
        return decode(self._video_file(key, row), size, self._info["fps"], start, row["length"])


def _read_info(path: Path) -> dict[str, Any]:
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); download the data set again") from error
    if not isinstance(info, dict):
        raise UserError(f"{path}: a {type(info).__name__}, expected an object; download the data set again")
    return info


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
    features = info.get("features")
    if not isinstance(features, dict) or not all(isinstance(feature, dict) for feature in features.values()):
        raise UserError(f"{path}: features is missing or no object of objects; download the data set again")


def _check_path(path: Path, info: dict[str, Any], key: str, **parts: str | int) -> None:
    """Whether the pattern at ``key`` of the info makes a path of ``parts``, inside the set."""
    try:
        made = Path(info[key].format(**parts))
    except (KeyError, IndexError, ValueError, AttributeError, TypeError):
        made = None
    if made is None or made.is_absolute() or ".." in made.parts:
        names = ", ".join(f"{{{name}}}" for name in parts)
        raise UserError(
            f"{path}: {key} is {info.get(key)!r}, expected a path made of {names}; download the data set again"
        )


def _feature(path: Path, features: dict[str, dict[str, Any]], keys: Sequence[str], shape: list[int] | None) -> str:
    """The one of ``keys`` that the set has: a vector of ``shape``, or a camera where there is none."""
    found = next((key for key in keys if key in features), None)
    if found is None:
        raise UserError(f"{path}: no feature {' or '.join(keys)}; it has {', '.join(features)}")
    kind, size = features[found].get("dtype"), features[found].get("shape")
    if shape is not None and size != shape:
        raise UserError(f"{path}: {found} has shape {size}, expected LIBERO's {shape}")
    sides = size if isinstance(size, list) and all(isinstance(side, int) and side > 0 for side in size) else []
    if shape is None and (kind not in IMAGE_KINDS or len(sides) != 3):
        raise UserError(f"{path}: {found} is {kind} {size}, expected a video or image [h, w, 3]")
    return found


def _frame_size(feature: dict[str, Any]) -> tuple[int, int]:
    """Height and width of a camera's pictures, whose shape is given as [h, w, 3] or [3, h, w]."""
    sides = feature["shape"][1:] if feature["shape"][0] == 3 else feature["shape"][:2]
    return sides[0], sides[1]


def _present(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path}: not found; download the whole data set")
    return path


def _read_table(
    path: Path, columns: dict[str, pa.DataType] | None = None, filters: list[tuple] | None = None
) -> pa.Table:
    """The wanted columns of a Parquet file, in the types that are wanted and without empty cells; else all it has."""
    try:
        names = pq.read_schema(_present(path)).names
        lacking = [name for name in columns or () if name not in names]
        if lacking:
            has = ", ".join(name for name in names if not name.startswith("stats/"))
            raise UserError(f"{path}: no column {lacking[0]}; it has {has}; download the data set again")
        table = pq.read_table(path, columns=None if columns is None else list(columns), filters=filters)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: truncated or not Parquet ({first_line(error)}); download the file again") from error
    if columns is None:
        return table
    return pa.table({name: _cast(path, name, table[name], kind) for name, kind in columns.items()})


def _cast(path: Path, name: str, column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    if column.null_count:
        raise UserError(f"{path}: column {name} has {column.null_count} empty cells; download the data set again")
    try:
        return column.cast(kind)
    except pa.ArrowException as error:
        raise UserError(
            f"{path}: column {name} is {column.type}, expected {kind} ({first_line(error)}); download the data set "
            "again"
        ) from error


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _pictures(where: str, column: pa.ChunkedArray) -> np.ndarray:
    """The pictures inside a column, uint8 [n, h, w, 3]."""
    cells = column.to_pylist()
    absent = next((step for step, cell in enumerate(cells) if cell["bytes"] is None), None)
    if absent is not None:
        raise UserError(
            f"{where}: step {absent} only names the file {cells[absent]['path']!r}, expected the picture's bytes; save "
            "the data set with its pictures embedded"
        )
    try:
        return np.stack([np.asarray(Image.open(io.BytesIO(cell["bytes"]))) for cell in cells])
    except (OSError, SyntaxError, ValueError) as error:  # a picture cut off, PNG chunks that are broken, other sizes
        raise UserError(f"{where}: pictures cannot be read ({first_line(error)}); download the file again") from error
