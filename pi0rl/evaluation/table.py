"""The episode table: one row per planned episode, the only source of every published number."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from pi0rl.errors import UserError, first_line
from pi0rl.evaluation.completeness import EPISODE_COLUMNS, require_columns
from pi0rl.evaluation.statistics import EPISODE_KEY
from pi0rl.libero.plan import Episode, episode_init_state, episode_language, episode_task
from pi0rl.libero.slots import EpisodeResult
from pi0rl.libero.suites import state_hash

Row = dict[str, Any]


def episode_row(policy: str, protocol: str, seed: int, episode: Episode, result: EpisodeResult, video: str) -> Row:
    """The row of one episode (``EPISODE_COLUMNS``, and ``final_state``: the hash of the state it ended in).

    Args:
        policy: whose episode it is.
        protocol: hash of the protocol.
        seed: of the policy's noise.
        episode, result: what was planned, and how it went.
        video: path relative to the table, or empty.
    """
    task = episode_task(episode)
    return {
        "policy": policy,
        "protocol": protocol,
        "split": episode.split,
        "seed": seed,
        "index": episode.index,
        "suite": episode.suite,
        "task_id": episode.task_id,
        "task": task.name,
        "language": episode_language(episode),
        "init_state_id": episode.init_state_id,
        "state_hash": state_hash(episode_init_state(episode)),
        "scene_seed": episode.seed,
        "success_once": result.success,
        "success_at_end": result.success_at_end,
        "steps": result.steps,
        "seconds": round(result.seconds, 3),
        "failure": result.failure,
        "error": result.error or "",
        "video": video,
        "final_state": result.final_state,
    }


def episode_table(rows: Iterable[Row], policies: Iterable[str]) -> pd.DataFrame:
    """All rows: policies in the order given, then by split, seed and plan index, whatever order they finished in."""
    table = pd.DataFrame(list(rows), columns=[*EPISODE_COLUMNS, "final_state"])
    order = {policy: position for position, policy in enumerate(policies)}
    return table.sort_values(
        ["policy", *EPISODE_KEY], key=lambda column: column.map(order) if column.name == "policy" else column
    ).reset_index(drop=True)


def write_episode_table(table: pd.DataFrame, path: Path) -> None:
    """Write ``table`` as Parquet; the same rows give the same bytes."""
    table.to_parquet(path, engine="pyarrow", index=False, compression="zstd")


def read_episode_table(path: Path) -> pd.DataFrame:
    """What :func:`write_episode_table` wrote; raises UserError if it is not readable or lacks a column."""
    try:
        table = pd.read_parquet(path, engine="pyarrow")
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise UserError(f"{path}: not readable as Parquet ({first_line(error)}); copy it or evaluate again") from error
    require_columns(table, str(path))
    return table
