"""Episode tables from which no conclusion may be drawn are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from pi0rl.errors import UserError

EPISODE_COLUMNS: dict[str, str] = {
    "policy": "sft, ppo, grpo, or the name given to an evaluated checkpoint",
    "protocol": "hash of the evaluation protocol; rows of different protocols never share a table",
    "split": "official or held_out init states",
    "seed": "of the policy's noise",
    "index": "row of the plan; with split and seed it names the episode",
    "suite": "LIBERO's suite",
    "task_id": "the task within its suite",
    "task": "LIBERO's name of the task",
    "language": "the instruction that the policy was given",
    "init_state_id": "init state, an index into those of the split",
    "state_hash": "hash of the init state's positions and velocities",
    "scene_seed": "what placed the fixtures",
    "success_once": "the goal held at some step",
    "success_at_end": "the goal held at the last step played",
    "steps": "control steps played, settling not counted",
    "seconds": "wall time of the episode, with those it shared the machine with; the only column that never repeats",
    "failure": "kind of failure (pi0rl.libero.failures), empty for a success",
    "error": "why there is no outcome, empty where there is one",
    "video": "path relative to the table, empty if not recorded",
}
# Above this share of episodes without an outcome, what remains is no longer the sample that was planned.
MAX_ERROR_SHARE = 0.02


def require_complete(
    episodes: pd.DataFrame, planned: Mapping[tuple[str, int], int], source: str = "episode table"
) -> None:
    """Refuse a table from which no conclusion may be drawn.

    Args:
        planned: (split, seed) -> number of episodes in its plan; the plan's indices are 0 .. number - 1.
        source: what to call the table in the message.

    Raises:
        UserError: a column is missing, protocols are mixed, too many episodes ended in an error, or a policy's episodes
            are not the planned ones, each once, from the same init states as the other policies'.
    """
    require_columns(episodes, source)
    if episodes.empty:
        raise UserError(f"{source}: no episodes, expected at least one; run `pi0rl evaluate` again")
    protocols = sorted(episodes["protocol"].unique())
    if len(protocols) > 1:
        raise UserError(f"{source}: protocols {', '.join(protocols)} in one table, expected one; evaluate them apart")
    _require_few_errors(episodes, source)
    _require_outcomes(episodes, source)
    for policy, of_policy in episodes.groupby("policy", sort=True):
        passes: dict[tuple[str, int], list[int]] = {key: [] for key in planned}
        for split, seed, index in of_policy[["split", "seed", "index"]].itertuples(index=False):
            passes.setdefault((split, seed), []).append(index)
        for (split, seed), indices in sorted(passes.items()):
            where = f"{source}: {policy!r} on split {split!r}, seed {seed}"
            if (split, seed) not in planned:
                raise UserError(f"{where}: {len(indices)} episodes, none planned; delete the table")
            _require_planned(indices, planned[split, seed], where)
    _require_same_episodes(episodes, source)


def require_columns(episodes: pd.DataFrame, source: str) -> None:
    """Raises UserError if one of EPISODE_COLUMNS is missing."""
    missing = [column for column in EPISODE_COLUMNS if column not in episodes]
    if missing:
        raise UserError(f"{source}: no column {missing[0]!r}, expected {', '.join(EPISODE_COLUMNS)}")


def _require_few_errors(episodes: pd.DataFrame, source: str) -> None:
    for policy, rows in episodes.groupby("policy", sort=True):
        failed = rows[rows["error"] != ""]
        if len(failed) > MAX_ERROR_SHARE * len(rows):
            first = failed.iloc[0]
            raise UserError(
                f"{source}: {len(failed)} of {len(rows)} episodes of {policy!r} ended in an error, expected at most "
                f"{MAX_ERROR_SHARE:.0%} (first: {first['suite']} task {first['task_id']}, index {first['index']}: "
                f"{one_line(first['error'])}); run `pi0rl evaluate` again, it repeats them"
            )


def _require_outcomes(episodes: pd.DataFrame, source: str) -> None:
    """No task may be judged by none of its episodes."""
    judged: dict[tuple[str, str, int, str, int], bool] = {}
    columns = ["policy", "split", "seed", "suite", "task_id", "error"]
    for policy, split, seed, suite, task_id, error in episodes[columns].itertuples(index=False):
        task = (policy, split, seed, suite, task_id)
        judged[task] = judged.get(task, False) or not error
    for (policy, split, seed, suite, task_id), any_outcome in judged.items():
        if not any_outcome:
            raise UserError(
                f"{source}: all episodes of {policy!r} on {suite} task {task_id} (split {split!r}, seed {seed}) ended "
                "in an error, expected an outcome of at least one; run `pi0rl evaluate` again, it repeats them"
            )


def _require_planned(indices: Sequence[int], planned: int, where: str) -> None:
    if len(set(indices)) != len(indices):
        raise UserError(
            f"{where}: {len(indices)} episodes hold a plan index twice, expected each once; delete the table"
        )
    absent = sorted(set(range(planned)) - set(indices))
    if absent or len(indices) != planned:
        example = f", first missing index {absent[0]}" if absent else ""
        raise UserError(f"{where}: {len(indices)} episodes completed, {planned} planned{example}; run `pi0rl evaluate`")


def _require_same_episodes(episodes: pd.DataFrame, source: str) -> None:
    identity = ["suite", "task_id", "init_state_id", "state_hash", "scene_seed"]
    different = episodes.drop_duplicates(["split", "index", *identity])
    twice = different[different.duplicated(["split", "index"])]
    if len(twice):
        row = twice.iloc[0]
        raise UserError(
            f"{source}: plan index {row['index']} of split {row['split']!r} is not the same episode for every policy, "
            f"expected equal {', '.join(identity)}; delete the table and run `pi0rl evaluate` again"
        )


def one_line(text: str, limit: int = 120) -> str:
    """A reason as one line of at most ``limit`` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
