"""What the earlier stages left in the folder of a run, read once and checked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

from pi0rl.errors import UserError
from pi0rl.evaluation.completeness import require_complete
from pi0rl.evaluation.evaluator import experiment_exam
from pi0rl.evaluation.table import read_episode_table
from pi0rl.files import read_json
from pi0rl.params import Params, load_params
from pi0rl.tracking.alarms import Alarm
from pi0rl.tracking.metrics import read_alarms

STAGES: tuple[str, ...] = ("demos", "sft", "train", "evaluate")


@dataclass(frozen=True)
class StageTime:
    """Wall time of one stage: seconds, and its start as an ISO 8601 time (empty if not recorded)."""

    stage: str
    seconds: float
    started: str


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        directory: the folder of the run.
        sft_dir: what ``sft`` or ``fetch`` left; points of a sweep share it.
        params: its frozen params.
        params_text: the text of their file.
        episodes: one row per policy and episode (`pi0rl.evaluation.completeness.EPISODE_COLUMNS`), complete.
        metrics: one row per training iteration; empty without training.
        timing: ``time/*`` and ``perf/*``, one row per training iteration; empty without training.
        sft_metrics: one row per logged step of imitation; empty without imitation.
        alarms: what training warned of.
        stages: wall times in the order the stages ran.
    """

    directory: Path
    sft_dir: Path
    params: Params
    params_text: str
    episodes: pd.DataFrame
    metrics: pd.DataFrame
    timing: pd.DataFrame
    sft_metrics: pd.DataFrame
    alarms: tuple[Alarm, ...]
    stages: tuple[StageTime, ...]


def read_run(directory: Path) -> Run:
    """Read a run whose evaluation is finished.

    Raises:
        UserError: params or episode table are missing, or the table supports no conclusion.
    """
    table, params_file = directory / "evaluate" / "episodes.parquet", directory / "params.yaml"
    for path, stage in ((params_file, "run"), (table, "evaluate")):
        if not path.is_file():
            raise UserError(f"{path}: no such file, expected the output of an earlier stage; run `pi0rl {stage}` first")
    episodes = read_episode_table(table)
    params, sft_dir = load_params(params_file), _sft_dir(directory)
    require_complete(episodes, experiment_exam(params).planned(), source=str(table))
    return Run(
        directory=directory,
        sft_dir=sft_dir,
        params=params,
        params_text=params_file.read_text(encoding="utf-8"),
        episodes=episodes.sort_values(["policy", "split", "seed", "index"], ignore_index=True),
        metrics=_read_csv(directory / "train" / "metrics.csv"),
        timing=_read_csv(directory / "train" / "timing.csv"),
        sft_metrics=_read_csv(sft_dir / "metrics.csv"),
        alarms=tuple(read_alarms(directory / "train" / "alarms.csv")),
        stages=tuple(_stage_times(directory)),
    )


def _read_csv(path: Path) -> pd.DataFrame:
    return pd.read_csv(path) if path.is_file() else pd.DataFrame()


def _sft_dir(directory: Path) -> Path:
    """Where the run's stages look for the SFT policy, as its own dvc.yaml has it."""
    stages = directory / "dvc.yaml"
    if not stages.is_file():  # the project's own experiment
        return directory / "sft"
    folders = yaml.safe_load(stages.read_text(encoding="utf-8"))["vars"][0]
    return Path(os.path.normpath(directory / os.path.relpath(folders["sft_dir"], folders["run"])))


def _stage_times(directory: Path) -> list[StageTime]:
    times = []
    for stage in STAGES:
        path = directory / stage / "timing.json"
        if path.is_file():
            timing = read_json(path, ("seconds",))
            times.append(StageTime(stage, float(timing["seconds"]), str(timing.get("started", ""))))
    return times
