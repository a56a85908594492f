"""SwanLab, offline unless ``SWANLAB_MODE`` says otherwise; ``swanlab sync`` uploads the folder later."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

from pi0rl.errors import UserError
from pi0rl.experiment import Experiment
from pi0rl.tracking.loggers import Table, rows_after

try:
    import swanlab  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise UserError(
        "runner.logger.logger_backends names swanlab, which is not installed; pip install 'pi0rl[swanlab]'"
    ) from error


class SwanlabLogger:
    """The run in ``runs/<experiment>/swanlab``, written anew in every process like TensorBoard's."""

    def __init__(self, experiment: Experiment) -> None:
        folder = experiment.run_dir / "swanlab"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._run = swanlab.init(
            project=experiment.params.runner.logger.project_name,
            experiment_name=experiment.name,
            config=experiment.params.model_dump(mode="json"),
            logdir=str(folder),
            mode=os.environ.get("SWANLAB_MODE", "offline"),
        )
        self._sent = -1

    def sync(self, training: Sequence[Table], others: Sequence[Table] = ()) -> None:
        """Send the rows after the last sent step; SwanLab counts every metric's steps by themselves."""
        for step, values in rows_after(training, self._sent):
            self._run.log(values, step=step)
            self._sent = step
        for table in others:
            for step, values in table.items():
                self._run.log(values, step=step)

    def close(self, failed: bool) -> None:
        """End the run."""
        swanlab.finish(error="interrupted" if failed else None)
