"""Weights & Biases, offline unless ``WANDB_MODE`` says otherwise; ``wandb sync`` uploads the folder later."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

from pi0rl.errors import UserError
from pi0rl.experiment import Experiment
from pi0rl.params import params_hash
from pi0rl.tracking.loggers import Table, rows_after

try:
    import wandb  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise UserError(
        "runner.logger.logger_backends names wandb, which is not installed; pip install 'pi0rl[wandb]'"
    ) from error


class WandbLogger:
    """The run in ``runs/<experiment>/wandb``.

    Offline the folder is written anew in every process, so that resumed points never show twice. Online the run is
    resumed by its id, which the params decide, and goes on after the steps that it has.
    """

    def __init__(self, experiment: Experiment) -> None:
        mode = os.environ.get("WANDB_MODE", "offline")
        logger = experiment.params.runner.logger
        experiment.run_dir.mkdir(parents=True, exist_ok=True)
        if mode == "offline":
            shutil.rmtree(experiment.run_dir / "wandb", ignore_errors=True)
        self._run = wandb.init(
            project=logger.project_name,
            name=experiment.name,
            id=f"{experiment.name.replace('/', '-')}-{params_hash(experiment.params)}",
            resume="allow",
            dir=str(experiment.run_dir),
            config=experiment.params.model_dump(mode="json"),
            mode=mode,
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._sent = self._run.step - 1

    def sync(self, training: Sequence[Table], others: Sequence[Table] = ()) -> None:
        """Send the rows after the last sent step.

        W&B's steps grow over all metrics: the rows of ``others`` come after training's, and hold their own step as
        ``sft/step`` or ``eval/step``, over which their charts are drawn.
        """
        rows = list(rows_after(training, -1))
        for table in filter(None, others):
            group = next(iter(next(iter(table.values())))).partition("/")[0]
            self._run.define_metric(f"{group}/*", step_metric=f"{group}/step")
            for own_step, values in table.items():
                rows.append((rows[-1][0] + 1 if rows else 0, {**values, f"{group}/step": own_step}))
        for step, values in rows:
            if step > self._sent:
                self._run.log(values, step=step)
                self._sent = step

    def close(self, failed: bool) -> None:
        """End the run."""
        self._run.finish(exit_code=int(failed))
