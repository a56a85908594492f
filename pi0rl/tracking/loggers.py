"""Where metrics go beside the CSV files: MLflow and TensorBoard, behind one small interface.

The CSV files are the truth. A logger is handed the whole tables every time and sends what is missing, so a server that
was away, or a resumed run, leaves neither gaps nor double points.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Protocol

from pi0rl.experiment import Experiment

# step -> metric -> value
Table = dict[int, dict[str, float]]


class Logger(Protocol):
    """One place that shows metrics."""

    def sync(self, tables: Sequence[Table]) -> None:
        """Send the rows that are not there yet; steps only grow from call to call."""
        ...

    def close(self, failed: bool) -> None:
        """The stage ended, well or not."""
        ...


class Loggers:
    """All loggers of an experiment."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self._loggers = tuple(loggers)

    def sync(self, tables: Sequence[Table]) -> None:
        """Hand the tables to each."""
        for logger in self._loggers:
            logger.sync(tables)

    def close(self, failed: bool) -> None:
        """Close each."""
        for logger in self._loggers:
            logger.close(failed)


def open_loggers(experiment: Experiment) -> Loggers:
    """The loggers that ``runner.logger.logger_backends`` names; says so where pi0rl does not have one."""
    loggers = []
    for name in experiment.params.runner.logger.logger_backends:
        if name not in _LOGGERS:
            print(
                f"runner.logger.logger_backends: no {name} logger yet; there are {', '.join(_LOGGERS)}", file=sys.stderr
            )
            continue
        loggers.append(_LOGGERS[name](experiment))
    return Loggers(loggers)


def _mlflow(experiment: Experiment) -> Logger:
    from pi0rl.tracking.mlflow_logger import MlflowLogger  # imports take seconds: only for those who log there

    return MlflowLogger(experiment)


def _tensorboard(experiment: Experiment) -> Logger:
    from pi0rl.tracking.tensorboard_logger import TensorboardLogger

    return TensorboardLogger(experiment)


_LOGGERS: dict[str, Callable[[Experiment], Logger]] = {"mlflow": _mlflow, "tensorboard": _tensorboard}
