"""The one list of metric names, and the files that hold them.

``metrics.csv`` holds what params and seed decide and repeats to the byte; ``timing.csv`` holds times, rates and how
busy the machine was. Both are written whole under a temporary name at every iteration, so a reader or a resume never
meets half a row.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import cast

from pi0rl.experiment import Experiment
from pi0rl.files import replace_text
from pi0rl.tracking.alarms import Alarm, Kind, alarms
from pi0rl.tracking.loggers import Table, open_loggers
from pi0rl.tracking.system import system_metrics
from pi0rl.tracking.terminal import TrainingView

STEP = "iteration"

METRICS: dict[str, str] = {
    "env/success_once": "share of the iteration's training episodes that succeeded at any step (sampled with noise)",
    "env/return": "mean sum of rewards of an episode",
    "env/episode_len": "mean control steps of an episode, up to its success or the limit",
    "env/num_trajectories": "episodes played",
    "env/steps": "control steps simulated, in compat those after success too",
    "rollout/rewards_mean": "mean reward of a control step",
    "rollout/samples": "chunks that are trained on",
    "rollout/advantages_mean": "mean advantage, normalised where that is asked for",
    "rollout/advantages_min": "smallest advantage",
    "rollout/advantages_max": "largest advantage",
    "rollout/advantages_std": "standard deviation of the advantages",
    "rollout/returns_mean": "mean target of the critic",
    "rollout/returns_min": "smallest target of the critic",
    "rollout/returns_max": "largest target of the critic",
    "rollout/returns_std": "standard deviation of the critic's targets",
    "actor/loss": "what is minimised: policy loss, value loss, entropy bonus and KL to the start",
    "actor/policy_loss": "clipped surrogate loss",
    "actor/policy_loss_abs": "mean absolute value of the clipped surrogate",
    "actor/value_loss": "Huber loss of the critic, clipped where value_clip is set",
    "actor/grad_norm": "gradient norm of the policy before clipping (compat: with the value head's)",
    "actor/approx_kl": "KL of the old to the updated policy, mean of -log ratio; reward_type action_level: per action",
    "actor/approx_kl_k2": "the same by log ratio squared / 2, which a single sample hardly moves; target_kl watches it",
    "actor/approx_kl_k3": "the same by the estimator ratio - 1 - log ratio, never negative",
    "actor/max_kl": "largest of the minibatches' actor/approx_kl_k2 (compat: k3); collapse_kl watches it",
    "actor/ref_kl": "KL to the policy that training began from, as kl_beta weighs it",
    "actor/pg_clipfrac": "share of ratios held back by clipping: out of range, on the side that lowers the loss",
    "actor/dual_clipfrac": "share of ratios that clip_ratio_c caps",
    "actor/clipped_ratio": "mean ratio after clipping",
    "actor/dual_clipped_ratio": "mean over all ratios of those that clip_ratio_c caps, the others as 0",
    "actor/ratio": "mean ratio of new to old probability",
    "actor/ratio_abs": "mean distance of the ratio from 1",
    "actor/first_ratio_error": "largest log ratio on the first minibatch, which must be 0 up to rounding",
    "actor/value_clip_ratio": "share of values that value_clip clips",
    "actor/entropy": "mean entropy of the sampler's Gaussian per dimension, where the noise is learned (flow_noise)",
    "actor/lr": "learning rate of the policy",
    "actor/optimizer_steps": "optimiser steps that moved the policy",
    "actor/skipped_steps": "optimiser steps left out because a gradient was not finite",
    "actor/stopped_by_kl": "1 if target_kl ended the policy's part of the update early",
    "actor/rollbacks": "how often the run has gone back to its best checkpoint; from the first time on",
    "critic/grad_norm": "gradient norm of the value head before clipping",
    "critic/lr": "learning rate of the value head",
    "critic/optimizer_steps": "optimiser steps that moved the value head",
    "critic/explained_variance": "1 - Var(target - value) / Var(target)",
    "sft/loss": "flow-matching loss of a batch",
    "sft/grad_norm": "gradient norm before clipping",
    "sft/lr": "learning rate",
    "sft/val_loss": "flow-matching loss on the demonstrations of sft.val_demos_per_task",
    "sft/success_once": "success on official init states where imitation is checked while it trains",
    "eval/<suite>/success_once": "success without noise where training is validated",
    "eval/<policy>/<split>/<suite>/success_once": "success without noise on the evaluation plan",
    "time/step": "seconds of an iteration: rollouts, update and hand-over, without validation",
    "time/generate_rollouts": "seconds in which its episodes are played",
    "time/actor_training": "seconds of advantages and update",
    "time/sync_weights": "seconds in which the new weights are handed over",
    "time/eval": "seconds of its validation, where one was due",
    "time/env/reset": "seconds in which an env worker resets scenes, mean of all",
    "time/env/simulate": "seconds in which an env worker simulates, mean of all",
    "time/env/render": "seconds in which an env worker renders, mean of all",
    "time/rollout/act": "seconds in which a rollout worker infers actions, mean of all",
    "perf/env_steps_per_second": "control steps simulated per second of the iteration",
    "perf/env_utilization": "share of the iteration in which an env worker works, mean of all",
    "perf/env_slowest": "seconds of the busiest env worker over the mean of all",
    "perf/rollout_utilization": "share of the iteration in which a rollout worker infers actions, mean of all",
    "perf/actor_utilization": "share of the iteration that is advantages and update",
    "perf/alarms": "alarms of the iteration, where there are any",
    "system/cpu_utilization_percentage": "how busy the cores were since the last iteration, 0 to 100",
    "system/system_memory_usage_megabytes": "main memory in use",
    "system/system_memory_usage_percentage": "the same of what there is, 0 to 100",
    "system/gpu_<n>_utilization_percentage": "how busy GPU n is, 0 to 100",
    "system/gpu_<n>_memory_usage_megabytes": "memory in use on GPU n",
    "system/gpu_<n>_memory_usage_percentage": "the same of what it has, 0 to 100",
    "system/gpu_<n>_power_usage_watts": "what GPU n draws",
}


def unexplained(names: Collection[str]) -> list[str]:
    """Those of ``names`` that METRICS lacks; its ``<suite>`` and the like stand for any."""
    patterns = [re.sub("<[a-z]+>", "*", name) for name in METRICS if "<" in name]
    known = (name in METRICS or any(fnmatchcase(name, pattern) for pattern in patterns) for name in names)
    return sorted(name for name, explained in zip(names, known, strict=True) if not explained)


class MetricsWriter:
    """Writes each training iteration to ``train/metrics.csv``, ``train/timing.csv`` and the loggers, and shows it.

    What is alarming about it is shown too, and kept in ``train/alarms.csv``.
    """

    def __init__(self, experiment: Experiment) -> None:
        folder = experiment.stage_dir("train")
        self._metrics = CsvTable(folder / "metrics.csv", columns=tuple(METRICS))
        self._timing = CsvTable(folder / "timing.csv", columns=())
        self._alarms = AlarmFile(folder / "alarms.csv")
        self._target_kl = experiment.params.algorithm.target_kl
        self._view = TrainingView(experiment.params.runner.max_epochs)
        self._loggers = open_loggers(experiment)

    def resume(self, done: int) -> None:
        """Keep the rows of the first ``done`` iterations and drop later ones, which will be played again."""
        self._metrics.resume(done)
        self._timing.resume(done)
        self._alarms.resume(done)
        self._loggers.sync(self._tables())

    def write(
        self,
        iteration: int,
        metrics: Mapping[str, float],
        timing: Mapping[str, float],
        events: Sequence[str] = (),
    ) -> None:
        """Add the row of ``iteration`` (from 0); raises ValueError for a metric that METRICS does not explain.

        Args:
            events: what the guards did, in words.
        """
        timing = {**timing, **system_metrics()}
        if unknown := unexplained([*metrics, *timing]):
            raise ValueError(f"metrics without an explanation in pi0rl.tracking.metrics.METRICS: {', '.join(unknown)}")
        self._metrics.append(iteration, metrics)
        self._timing.append(iteration, timing)
        tables = self._tables()
        found = alarms(iteration, metrics, *tables, self._target_kl)
        found += tuple(Alarm(iteration, "collapse", event) for event in events)
        self._alarms.add(found)
        if found:
            self._timing.append(iteration, {**timing, "perf/alarms": len(found)})
        self._view.show(*tables, found)
        self._loggers.sync(self._tables())

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loggers.close(failed=error is not None)

    def _tables(self) -> tuple[Table, Table]:
        return (self._metrics.table(), self._timing.table())


class AlarmFile:
    """``iteration,kind,message`` of every alarm."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._alarms: list[Alarm] = []

    def resume(self, done: int) -> None:
        """Keep the alarms below iteration ``done``."""
        self._alarms = [alarm for alarm in read_alarms(self._path) if alarm.iteration < done]
        self._save()

    def add(self, found: Sequence[Alarm]) -> None:
        """Add alarms and write the file."""
        self._alarms += found
        self._save()

    def _save(self) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([STEP, "kind", "message"])
        writer.writerows([alarm.iteration, alarm.kind, alarm.message] for alarm in self._alarms)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self._path, text.getvalue())


def read_alarms(path: Path) -> list[Alarm]:
    """The alarms of a training; none without a file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [Alarm(int(row[0]), cast(Kind, row[1]), row[2]) for row in list(csv.reader(file))[1:]]


class CsvTable:
    """A small CSV file with one row per iteration: known columns in the order given, new ones after them by name."""

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self._path, self._columns = path, columns
        self._rows: dict[int, dict[str, float]] = {}

    def resume(self, done: int) -> None:
        """Start from the rows of the file below iteration ``done``."""
        kept = read_table(self._path) if self._path.is_file() else {}
        self._rows = {step: row for step, row in kept.items() if step < done}
        self._save()

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Add a row and write the file; a value that is not finite leaves its cell empty."""
        self._rows[step] = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        self._save()

    def table(self) -> Table:
        """All rows by step."""
        return dict(self._rows)

    def _save(self) -> None:
        present = {name for row in self._rows.values() for name in row}
        columns = [name for name in self._columns if name in present] + sorted(present - set(self._columns))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([STEP, *columns])
        for step in sorted(self._rows):
            row = self._rows[step]
            writer.writerow([step, *(repr(row[name]) if name in row else "" for name in columns)])
        self._path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self._path, text.getvalue())


def read_table(path: Path) -> Table:
    """step -> name -> value of a metrics file whose first column is the step; empty and nan cells are left out."""
    with path.open(newline="") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    return {
        int(float(row[0])): {
            name: float(cell) for name, cell in zip(header[1:], row[1:], strict=True) if cell and cell != "nan"
        }
        for row in rows
    }
