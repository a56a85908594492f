"""The episode table: one row per planned episode, the only source of every published number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from pi0rl.libero.plan import Episode, episode_init_state, episode_task
from pi0rl.libero.slots import EpisodeResult
from pi0rl.libero.suites import state_hash


def episode_table(
    policy: str, plan: Sequence[Episode], results: Sequence[EpisodeResult], videos: dict[int, str]
) -> pd.DataFrame:
    """One row per episode of ``plan``.

    Args:
        policy: ``sft``, ``ppo`` or ``grpo``.
        plan: the planned episodes.
        results: their results in the same order.
        videos: plan index -> path of its video, relative to the table.
    """
    rows = []
    for episode, result in zip(plan, results, strict=True):
        task = episode_task(episode)
        rows.append(
            {
                "policy": policy,
                "split": episode.split,
                "index": episode.index,
                "suite": episode.suite,
                "task_id": episode.task_id,
                "task": task.name,
                "language": task.language,
                "init_state_id": episode.init_state_id,
                "state_hash": state_hash(episode_init_state(episode)),
                "seed": episode.seed,
                "success_once": result.success,
                # an episode ends at its first success, as in openpi's protocol
                "success_at_end": result.success,
                "steps": result.steps,
                "final_state": result.final_state,
                "error": "",
                "video": videos.get(episode.index, ""),
            }
        )
    return pd.DataFrame(rows)


def write_episode_table(table: pd.DataFrame, path: Path) -> None:
    """Write ``table`` as Parquet; the same rows give the same bytes."""
    table.to_parquet(path, engine="pyarrow", index=False, compression="zstd")
