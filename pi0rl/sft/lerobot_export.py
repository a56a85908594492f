"""Writing demonstrations as a LeRobotDataset v3: Parquet, video, statistics and a card; the same set, the same bytes.

Every task has one data file and one video file per camera. Pictures are turned by 180 degrees, as all LIBERO sets in
this format have them, and lose a little in the video's compression.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pi0rl.errors import UserError
from pi0rl.files import replace_directory
from pi0rl.libero.video import LEARNED_FROM, encode
from pi0rl.policy.sources import names_hub_revision
from pi0rl.progress import Progress
from pi0rl.sft import demonstrations as layout
from pi0rl.sft.lerobot_dataset import ACTION_KEYS, BASE_KEYS, DISTURBED, INFO, STATE_KEYS, TASKS, WRIST_KEYS

VERSION = "v3.0"
CAMERA_KEYS = (BASE_KEYS[0], WRIST_KEYS[0])
STATE, ACTION = STATE_KEYS[0], ACTION_KEYS[0]
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
STATE_NAMES = ("x", "y", "z", "axis_angle1", "axis_angle2", "axis_angle3", "finger1", "finger2")
ACTION_NAMES = ("x", "y", "z", "axis_angle1", "axis_angle2", "axis_angle3", "gripper")
INDICES = ("frame_index", "episode_index", "index", "task_index")
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
PICTURES_FOR_STATISTICS = 100  # of an episode, at most

Statistics = dict[str, Any]


def export(source: Path, target: Path) -> None:
    """Write the set of demonstrations in ``source`` as a LeRobotDataset into the new folder ``target``.

    Raises:
        UserError: no such set, without pictures at every step or with odd sizes, or something is at ``target``.
    """
    card = layout.read_card(source)
    if target.exists():
        raise UserError(f"{target}: exists already; choose a new folder")
    if card["image_stride"] != 1 or card["image_size"] % 2:
        raise UserError(
            f"{source}: pictures of {card['image_size']} pixels at every {card['image_stride']} steps, expected an "
            "even size at every step; collect with demos.image_stride: 1 and an even env.camera_size"
        )
    found = layout.damage(source, card)
    if found is not None:
        raise UserError(f"{found}; collect the demonstrations again")
    steps = layout.read_steps(source, card)
    with replace_directory(target) as folder:
        rows = list(_write_tasks(source, card, steps, folder))
        _write_table(folder / EPISODES_PATH, pa.Table.from_pylist(rows))
        names = pd.Index([task["language"] for task in card["tasks"]], name="task")
        tasks = pd.DataFrame({"task_index": np.arange(len(names))}, index=names)
        _write_table(folder / TASKS, pa.Table.from_pandas(tasks))
        info = _info(card, steps, len(rows))
        _write_json(folder / INFO, info)
        _write_json(folder / "meta/stats.json", _all_statistics(card, steps, rows))
        (folder / "README.md").write_text(_readme(card, info), encoding="utf-8")


def _write_tasks(source: Path, card: dict[str, Any], steps: layout.Steps, folder: Path) -> Iterator[dict[str, Any]]:
    """Data and videos, a task at a time; yields a row of ``meta/episodes`` per episode."""
    progress = Progress("export", len(card["tasks"]), "task")
    for index, task in enumerate(card["tasks"]):
        pictures = np.load(source / layout.image_name(task["suite"], task["task_id"]), mmap_mode="r")
        of_task = np.flatnonzero(steps.task == index)
        _write_table(folder / DATA_PATH.format(chunk_index=0, file_index=index), _data(steps, of_task))
        for camera, key in enumerate(CAMERA_KEYS):
            path = folder / VIDEO_PATH.format(video_key=key, chunk_index=0, file_index=index)
            path.parent.mkdir(parents=True, exist_ok=True)
            encode(path, pictures[:, camera, ::-1, ::-1], layout.FPS, LEARNED_FROM)
        for episode in np.unique(steps.episode[of_task]):
            rows = np.flatnonzero(steps.episode == episode)
            local = rows - of_task[0]
            yield _episode(int(episode), index, task["language"], rows, local) | _episode_statistics(
                steps, rows, pictures[local[0] : local[-1] + 1]
            )
        progress.update(index + 1)


def _data(steps: layout.Steps, rows: np.ndarray) -> pa.Table:
    columns = {
        STATE: steps.state[rows],
        ACTION: steps.actions[rows],
        "timestamp": (steps.step[rows] / layout.FPS).astype(np.float32),
        **{name: values[rows] for name, values in _integers(steps).items()},
    }
    return layout.steps_table(columns)


def _integers(steps: layout.Steps) -> dict[str, np.ndarray]:
    """The columns of whole numbers: LeRobot's indices, and where something was disturbed the flags."""
    columns = dict(zip(INDICES, (steps.step, steps.episode, np.arange(len(steps.step)), steps.task), strict=True))
    columns |= {DISTURBED: steps.disturbed} if steps.disturbed.any() else {}
    return {name: column.astype(np.int64) for name, column in columns.items()}


def _episode(episode: int, file: int, instruction: str, rows: np.ndarray, local: np.ndarray) -> dict[str, Any]:
    """Where an episode is: rows of the whole set, and times in its task's videos."""
    row: dict[str, Any] = {
        "episode_index": episode,
        "tasks": [instruction],
        "length": len(rows),
        "data/chunk_index": 0,
        "data/file_index": file,
        "dataset_from_index": int(rows[0]),
        "dataset_to_index": int(rows[-1]) + 1,
        "meta/episodes/chunk_index": 0,
        "meta/episodes/file_index": 0,
    }
    for key in CAMERA_KEYS:
        row |= {
            f"videos/{key}/chunk_index": 0,
            f"videos/{key}/file_index": file,
            f"videos/{key}/from_timestamp": float(local[0] / layout.FPS),
            f"videos/{key}/to_timestamp": float((local[-1] + 1) / layout.FPS),
        }
    return row


def _episode_statistics(steps: layout.Steps, rows: np.ndarray, pictures: np.ndarray) -> dict[str, Any]:
    """An episode's statistics as columns of ``meta/episodes``."""
    some = np.unique(np.linspace(0, len(pictures) - 1, PICTURES_FOR_STATISTICS).astype(int))
    found = _vector_statistics(steps, rows)
    for camera, key in enumerate(CAMERA_KEYS):
        values = _statistics(pictures[some, camera].reshape(-1, 3) / 255.0)
        found[key] = {name: [[[number]] for number in row] for name, row in values.items()} | {"count": [len(some)]}
    return {f"stats/{key}/{name}": value for key, values in found.items() for name, value in values.items()}


def _vector_statistics(steps: layout.Steps, rows: np.ndarray) -> dict[str, Statistics]:
    values = {STATE: steps.state[rows], ACTION: steps.actions[rows], "timestamp": steps.step[rows, None] / layout.FPS}
    values |= {name: column[rows, None] for name, column in _integers(steps).items()}
    return {name: _statistics(column) | {"count": [len(rows)]} for name, column in values.items()}


def _statistics(values: np.ndarray) -> Statistics:
    """Statistics of the columns of [n, d], each a list of d numbers."""
    values = values.astype(np.float64)
    quantiles = np.quantile(values, list(QUANTILES.values()), axis=0)
    found = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    found |= dict(zip(QUANTILES, quantiles, strict=True))
    return {name: row.tolist() for name, row in found.items()}


def _all_statistics(card: dict[str, Any], steps: layout.Steps, rows: list[dict[str, Any]]) -> dict[str, Statistics]:
    """Statistics of the whole set: exact for vectors, for pictures put together from the episodes' samples."""
    found = _vector_statistics(steps, np.arange(len(steps.step)))
    for key in CAMERA_KEYS:
        parts = {name: np.array([row[f"stats/{key}/{name}"] for row in rows]) for name in _statistics(np.zeros((1, 1)))}
        weights = np.array([row[f"stats/{key}/count"] for row in rows], np.float64)[:, :, None, None]
        share = weights / weights.sum()
        mean = (share * parts["mean"]).sum(0)
        spread = (share * (parts["std"] ** 2 + (parts["mean"] - mean) ** 2)).sum(0)
        whole = {"min": parts["min"].min(0), "max": parts["max"].max(0), "mean": mean, "std": np.sqrt(spread)}
        whole |= {name: (share * parts[name]).sum(0) for name in QUANTILES}
        found[key] = {name: value.tolist() for name, value in whole.items()} | {"count": [int(weights.sum())]}
    return found


def _info(card: dict[str, Any], steps: layout.Steps, episodes: int) -> dict[str, Any]:
    size = card["image_size"]
    camera = {
        "dtype": "video",
        "shape": [size, size, 3],
        "names": ["height", "width", "channels"],
        "info": {
            "video.height": size,
            "video.width": size,
            "video.codec": "h264",
            "video.pix_fmt": "yuv420p",
            "video.is_depth_map": False,
            "video.fps": layout.FPS,
            "video.channels": 3,
            "has_audio": False,
        },
    }
    features: dict[str, Any] = dict.fromkeys(CAMERA_KEYS, camera)
    features[STATE] = {"dtype": "float32", "shape": [layout.STATE_DIM], "names": list(STATE_NAMES)}
    features[ACTION] = {"dtype": "float32", "shape": [layout.ACTION_DIM], "names": list(ACTION_NAMES)}
    features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
    features |= {name: {"dtype": "int64", "shape": [1], "names": None} for name in _integers(steps)}
    return {
        "codebase_version": VERSION,
        "robot_type": "panda",
        "total_episodes": episodes,
        "total_frames": card["steps"],
        "total_tasks": len(card["tasks"]),
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": layout.FPS,
        "splits": {"train": f"0:{episodes}"},
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH,
        "features": features,
    }


def _readme(card: dict[str, Any], info: dict[str, Any]) -> str:
    counts = [sum(episode["task"] == index for episode in card["episodes"]) for index in range(len(card["tasks"]))]
    rows = [
        f"| {index} | {task['suite']} {task['task_id']} | {task['language']} | {count} |"
        for index, (task, count) in enumerate(zip(card["tasks"], counts, strict=True))
    ]
    flags = [
        f"- `{DISTURBED}`: 1 at steps where something else than the action was executed, so that the next ones show "
        "how to come back; do not imitate action chunks that overlap them."
    ]
    return "\n".join(
        [
            "---",
            # whose licence imported ones have is not known here
            *(["license: apache-2.0"] if "collection" in card else []),
            "task_categories:",
            "- robotics",
            "tags:",
            "- LeRobot",
            "- LIBERO",
            "- pi0rl",
            "configs:",
            "- config_name: default",
            "  data_files: data/*/*.parquet",
            "---",
            "",
            "# LIBERO demonstrations",
            "",
            f"{_origin(card)} {info['total_episodes']} successful episodes, {info['total_frames']} control steps at "
            f"{info['fps']} a second, two cameras of {card['image_size']} pixels, fingerprint {card['fingerprint']}.",
            "",
            f"- `{STATE}`: end-effector position (m), axis-angle (rad), both finger joints (m), before the action.",
            f"- `{ACTION}`: LIBERO's seven numbers in [-1, 1]: OSC_POSE deltas and the gripper (1 closes).",
            f"- `{CAMERA_KEYS[0]}`, `{CAMERA_KEYS[1]}`: agentview and wrist camera, turned upright (180 degrees from "
            "what LIBERO renders), H.264.",
            *(flags if DISTURBED in info["features"] else []),
            "",
            "| task | of | instruction | episodes |",
            "|---:|---|---|---:|",
            *rows,
            "",
            "[meta/info.json](meta/info.json) has the rest.",
            "",
        ]
    )


def _origin(card: dict[str, Any]) -> str:
    """Who made the demonstrations, without paths of this machine."""
    made = card.get("collection")
    if made is None:
        source = card["import"]["source"]
        # cards have not always had the commit of a set from the hub; `.` and `..` have a name only as whole paths
        from_hub = "commit" in card["source"] or names_hub_revision(source)
        return f"Taken over from `{source if from_hub else Path(source).resolve().name}`."
    noise = f" with action noise {made['action_noise']:g} (labels without)" if made["action_noise"] else ""
    return f"Played by pi0rl's scripted expert{noise} from {made['split']} init states, seed {made['seed']}."


def _write_table(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
