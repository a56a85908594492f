"""What the earlier stages left in the folder of a run, read once and checked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import yaml

from pi0rl.errors import UserError
from pi0rl.evaluation.completeness import require_complete
from pi0rl.evaluation.evaluator import experiment_exam
from pi0rl.evaluation.protocols import Protocol
from pi0rl.evaluation.table import read_episode_table
from pi0rl.invocations import Invocation, read_invocations
from pi0rl.params import Params, load_params
from pi0rl.tracking.alarms import Alarm
from pi0rl.tracking.metrics import read_alarms

STAGES: tuple[str, ...] = ("demos", "sft", "train", "evaluate")


@dataclass(frozen=True)
class StageRecord:
    """What one stage took.

    Attributes:
        stage: its name.
        shared: whether points of a sweep share it.
        invocations: one, or more where it was interrupted.
    """

    stage: str
    shared: bool
    invocations: tuple[Invocation, ...]

    @property
    def label(self) -> str:
        """``demos (shared)``."""
        return f"{self.stage} (shared)" if self.shared else self.stage

    @property
    def seconds(self) -> float:
        """Wall time of all its invocations."""
        return sum(invocation.seconds for invocation in self.invocations)

    @property
    def started(self) -> str:
        """ISO 8601 time at which it was begun."""
        return self.invocations[0].started


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        directory: the folder of the run.
        sft_dir: what ``sft`` or ``fetch`` left; points of a sweep share it.
        protocol: under which the episodes were played; that of the params.
        params: its frozen params.
        params_text: the text of their file.
        episodes: one row per policy and episode (`pi0rl.evaluation.completeness.EPISODE_COLUMNS`), complete.
        metrics: one row per training iteration; empty without training.
        timing: ``time/*`` and ``perf/*``, one row per training iteration; empty without training.
        sft_metrics: one row per logged step of imitation; empty without imitation.
        alarms: what training warned of.
        stages: in the order they ran, those of which a record is left.
    """

    directory: Path
    sft_dir: Path
    protocol: Protocol
    params: Params
    params_text: str
    episodes: pd.DataFrame
    metrics: pd.DataFrame
    timing: pd.DataFrame
    sft_metrics: pd.DataFrame
    alarms: tuple[Alarm, ...]
    stages: tuple[StageRecord, ...]


def read_run(directory: Path) -> Run:
    """Read a run whose evaluation is finished.

    Raises:
        UserError: params or episode table are missing, or the table supports no conclusion, or is of another protocol
            than the params.
    """
    table, params_file = directory / "evaluate" / "episodes.parquet", directory / "params.yaml"
    for path, stage in ((params_file, "run"), (table, "evaluate")):
        if not path.is_file():
            raise UserError(f"{path}: no such file, expected the output of an earlier stage; run `pi0rl {stage}` first")
    episodes = read_episode_table(table)
    params = load_params(params_file)
    exam = experiment_exam(params)
    require_complete(episodes, exam.planned(), source=str(table))
    played = str(episodes["protocol"].iloc[0])
    if played != exam.protocol.hash:
        raise UserError(
            f"{table}: played under protocol {played}, expected {exam.protocol.hash}, that of {params_file}; run "
            "`pi0rl evaluate` again"
        )
    stages = STAGES if params.fetch is None else STAGES[1:]
    folders = {stage: _stage_dir(directory, stage) for stage in stages}
    timing = _read_csv(directory / "train" / "timing.csv")
    return Run(
        directory=directory,
        sft_dir=folders["sft"],
        protocol=exam.protocol,
        params=params,
        params_text=params_file.read_text(encoding="utf-8"),
        episodes=episodes.sort_values(["policy", "split", "seed", "index"], ignore_index=True),
        metrics=_read_csv(directory / "train" / "metrics.csv"),
        timing=timing,
        sft_metrics=_read_csv(folders["sft"] / "metrics.csv"),
        alarms=tuple(read_alarms(directory / "train" / "alarms.csv")),
        stages=_stage_records(directory, folders, timing),
    )


def _read_csv(path: Path) -> pd.DataFrame:
    return pd.read_csv(path) if path.is_file() else pd.DataFrame()


def _stage_dir(directory: Path, stage: str) -> Path:
    """Where the run's own dvc.yaml has what ``stage`` left."""
    stages = directory / "dvc.yaml"
    if not stages.is_file():  # the project's own experiment
        return directory / stage
    folders = yaml.safe_load(stages.read_text(encoding="utf-8"))["vars"][0]
    elsewhere = folders.get(f"{stage}_dir", f"{folders['run']}/{stage}")
    return Path(os.path.normpath(directory / os.path.relpath(elsewhere, folders["run"])))


def _stage_records(directory: Path, folders: Mapping[str, Path], timing: pd.DataFrame) -> tuple[StageRecord, ...]:
    records = []
    for stage, folder in folders.items():
        if invocations := read_invocations(folder):
            record = StageRecord(stage, folder.parent != directory, invocations)
            if stage == "train" and "time/step" in timing:
                # Earlier versions recorded the last invocation alone; iterations were always timed.
                missing = max(0.0, float(timing["time/step"].to_numpy().sum()) - record.seconds)
                last = replace(invocations[-1], seconds=invocations[-1].seconds + missing)
                record = replace(record, invocations=(*invocations[:-1], last))
            records.append(record)
    return tuple(records)
