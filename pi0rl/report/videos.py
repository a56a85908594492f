"""Which rollouts a report shows: before and after from the same init state, and failures by kind."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import pandas as pd

from pi0rl.errors import UserError
from pi0rl.evaluation.statistics import EPISODE_KEY

OUTCOMES = {
    (False, True): "gained",
    (True, False): "lost",
    (True, True): "solved by both",
    (False, False): "solved by neither",
}
# Most of what changed, and always something of what did not, so that the choice does not flatter the policy.
_PER_OUTCOME = {"gained": 4, "lost": 1, "solved by both": 1, "solved by neither": 1}


@dataclass(frozen=True)
class Side:
    """One policy's rollout: its video file, whether it succeeded, and its number of control steps."""

    policy: str
    video: Path
    success: bool
    steps: int


@dataclass(frozen=True)
class Pair:
    """Two policies from the same init state."""

    outcome: str
    split: str
    suite: str
    task_id: int
    init_state_id: int
    language: str
    before: Side
    after: Side


def choose_pairs(episodes: pd.DataFrame, folder: Path, before: str, after: str, max_bytes: int) -> tuple[Pair, ...]:
    """A few recorded episodes of two policies, each of another task where possible.

    Args:
        episodes: the episode table; its `video` is relative to `folder`, empty where nothing was recorded.
        max_bytes: the videos of the chosen pairs are together no larger than this.

    Raises:
        UserError: a video that the table names does not exist.
    """
    recorded = episodes.loc[episodes["video"].fillna("") != ""]
    sides = [recorded.loc[recorded["policy"] == policy].set_index(EPISODE_KEY) for policy in (before, after)]
    both = sorted(set(sides[0].index) & set(sides[1].index))
    pairs = [_pair(sides[0].loc[[key]], sides[1].loc[[key]], folder) for key in both]
    chosen: list[Pair] = []
    size = 0
    for outcome, limit in _PER_OUTCOME.items():
        for pair in _distinct_tasks([pair for pair in pairs if pair.outcome == outcome], chosen)[:limit]:
            size += sum(side.video.stat().st_size for side in (pair.before, pair.after))
            if size > max_bytes:
                return tuple(chosen)
            chosen.append(pair)
    return tuple(chosen)


@dataclass(frozen=True)
class Failure:
    """A recorded failure of one policy."""

    kind: str
    suite: str
    task_id: int
    init_state_id: int
    language: str
    side: Side


def choose_failures(
    episodes: pd.DataFrame, folder: Path, policy: str, per_kind: int, max_bytes: int
) -> dict[str, tuple[Failure, ...]]:
    """Kind -> a few recorded failures of ``policy``, of different tasks where possible; kinds without any are left out.

    Args:
        per_kind: at most this many of each kind.
        max_bytes: the videos are together no larger than this.

    Raises:
        UserError: a video that the table names does not exist.
    """
    failed = episodes.query("policy == @policy and failure != '' and video != ''")
    chosen: dict[str, tuple[Failure, ...]] = {}
    size = 0
    for kind, rows in failed.groupby("failure", sort=True):
        repeated = rows.duplicated(["suite", "task_id"]).to_numpy(bool)
        for position in [*rows.index[~repeated], *rows.index[repeated]][:per_kind]:
            failure = _failure(rows.loc[[position]], folder)
            size += failure.side.video.stat().st_size
            if size > max_bytes:
                return chosen
            chosen[str(kind)] = (*chosen.get(str(kind), ()), failure)
    return chosen


def last_picture(video: Path) -> bytes:
    """The last frame of an mp4 file, as JPEG.

    Raises:
        UserError: the file holds no video.
    """
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", str(video), "-vf", "reverse"]
    command += ["-frames:v", "1", "-q:v", "4", "-f", "mjpeg", "-"]
    finished = subprocess.run(command, capture_output=True)
    if finished.returncode or not finished.stdout:
        raise UserError(f"{video}: no video can be read from it, expected an mp4 file; run `pi0rl evaluate` again")
    return finished.stdout


def _failure(rows: pd.DataFrame, folder: Path) -> Failure:
    row = rows.iloc[0]
    return Failure(
        kind=str(row["failure"]),
        suite=str(row["suite"]),
        task_id=int(row["task_id"]),
        init_state_id=int(row["init_state_id"]),
        language=str(row["language"]),
        side=_side(rows, folder),
    )


def _pair(before: pd.DataFrame, after: pd.DataFrame, folder: Path) -> Pair:
    first, second = _side(before, folder), _side(after, folder)
    row = before.reset_index().iloc[0]
    return Pair(
        outcome=OUTCOMES[first.success, second.success],
        split=str(row["split"]),
        suite=str(row["suite"]),
        task_id=int(row["task_id"]),
        init_state_id=int(row["init_state_id"]),
        language=str(row["language"]),
        before=first,
        after=second,
    )


def _side(rows: pd.DataFrame, folder: Path) -> Side:
    row = rows.iloc[0]
    video = folder / str(row["video"])
    if not video.is_file():
        raise UserError(
            f"{video}: no such file, expected the video the episode table names; run `pi0rl evaluate` again"
        )
    return Side(str(row["policy"]), video, bool(row["success_once"]), int(row["steps"]))


def _distinct_tasks(pairs: list[Pair], chosen: list[Pair]) -> list[Pair]:
    """The pairs in their order, those first whose task is not shown yet."""
    shown = {(pair.suite, pair.task_id) for pair in chosen}
    new, repeated = [], []
    for pair in pairs:
        task = (pair.suite, pair.task_id)
        (repeated if task in shown else new).append(pair)
        shown.add(task)
    return new + repeated
