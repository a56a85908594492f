"""Where metrics go beside the CSV files: MLflow, TensorBoard, W&B and SwanLab, behind one small interface.

The CSV files are the truth. A logger is handed the whole tables every time and sends what is missing, so a server that
was away, or a resumed run, leaves neither gaps nor double points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from pi0rl.experiment import Experiment

# step -> metric -> value
Table = dict[int, dict[str, float]]


class Logger(Protocol):
    """One place that shows metrics."""

    def sync(self, training: Sequence[Table], others: Sequence[Table] = ()) -> None:
        """Send the rows that are not there yet.

        Args:
            training: tables whose steps are iterations; they only grow from call to call.
            others: tables with steps of their own, each whole; given once, when the experiment is over.
        """
        ...

    def close(self, failed: bool) -> None:
        """The stage ended, well or not."""
        ...


class Loggers:
    """All loggers of an experiment."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self._loggers = tuple(loggers)

    def __iter__(self) -> Iterator[Logger]:
        return iter(self._loggers)

    def sync(self, training: Sequence[Table], others: Sequence[Table] = ()) -> None:
        """Hand the tables to each."""
        for logger in self._loggers:
            logger.sync(training, others)

    def close(self, failed: bool) -> None:
        """Close each."""
        for logger in self._loggers:
            logger.close(failed)


def open_loggers(experiment: Experiment) -> Loggers:
    """The loggers that ``runner.logger.logger_backends`` names, each once.

    Raises:
        UserError: one of them needs a package that is not installed.
    """
    names = dict.fromkeys(experiment.params.runner.logger.logger_backends)
    return Loggers([_LOGGERS[name](experiment) for name in names])


def rows_after(tables: Sequence[Table], sent: int) -> Iterator[tuple[int, dict[str, float]]]:
    """Every step after ``sent`` in order, with the values of all tables."""
    for step in sorted({step for table in tables for step in table if step > sent}):
        yield step, {name: value for table in tables for name, value in table.get(step, {}).items()}


def _mlflow(experiment: Experiment) -> Logger:
    from pi0rl.tracking.mlflow_logger import MlflowLogger  # imports take seconds: only for those who log there

    return MlflowLogger(experiment)


def _tensorboard(experiment: Experiment) -> Logger:
    from pi0rl.tracking.tensorboard_logger import TensorboardLogger

    return TensorboardLogger(experiment)


def _wandb(experiment: Experiment) -> Logger:
    from pi0rl.tracking.wandb_logger import WandbLogger

    return WandbLogger(experiment)


def _swanlab(experiment: Experiment) -> Logger:
    from pi0rl.tracking.swanlab_logger import SwanlabLogger

    return SwanlabLogger(experiment)


_LOGGERS: dict[str, Callable[[Experiment], Logger]] = {
    "mlflow": _mlflow,
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "swanlab": _swanlab,
}
