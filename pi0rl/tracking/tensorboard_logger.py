"""TensorBoard event files in ``runs/<experiment>/tensorboard``."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from torch.utils.tensorboard import SummaryWriter

from pi0rl.experiment import Experiment
from pi0rl.tracking.loggers import Table, rows_after


class TensorboardLogger:
    """Writes the tables anew in every process, so that resumed points never show twice."""

    def __init__(self, experiment: Experiment) -> None:
        folder = experiment.run_dir / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder))
        self._sent = -1

    def sync(self, training: Sequence[Table], others: Sequence[Table] = ()) -> None:
        """Write the rows after the last written step."""
        for step, values in rows_after(training, self._sent):
            self._write(step, values)
            self._sent = step
        for table in others:
            for step, values in table.items():
                self._write(step, values)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        """Close the event file."""
        self._writer.close()

    def _write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
