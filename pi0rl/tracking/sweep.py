"""The MLflow run of a sweep, under which its points' runs stand."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
from mlflow import MlflowClient

from pi0rl.errors import first_line
from pi0rl.experiment import Experiment
from pi0rl.files import replace_text
from pi0rl.provenance import commit
from pi0rl.tracking.mlflow_logger import FAILURES, RUN_ID, experiment_id, find_run, tracking_uri


def begin_sweep(name: str, folder: Path, point: Experiment) -> None:
    """Continue the sweep's run, or begin one; ``folder/mlflow_run_id`` says to the points which it is.

    Args:
        name: of the sweep.
        folder: ``runs/sweeps/<name>``.
        point: any of its experiments: it says where to log, and whether at all.
    """
    logger = point.params.runner.logger
    if "mlflow" not in logger.logger_backends:
        return
    try:
        client = MlflowClient(tracking_uri(point.root))
        path = folder / RUN_ID
        run = find_run(client, path.read_text().strip()) if path.is_file() else None
        if run is None:
            checkout = commit(point.root)
            tags = {
                "pi0rl.kind": "sweep",
                "mlflow.source.name": f"pi0rl sweep {name}",
                "mlflow.source.git.commit": checkout.hash,
                "git.dirty": str(checkout.dirty).lower(),
            }
            run = client.create_run(experiment_id(client, logger.project_name, point.root), tags=tags, run_name=name)
            folder.mkdir(parents=True, exist_ok=True)
            replace_text(path, run.info.run_id + "\n")
        client.update_run(run.info.run_id, status="RUNNING")
    except FAILURES as error:
        _complain(point, error)


def finish_sweep(folder: Path, point: Experiment, report: Path | None, failed: int) -> None:
    """Add the comparison in ``report`` to the sweep's run and close it."""
    path = folder / RUN_ID
    if not path.is_file():
        return
    run_id = path.read_text().strip()
    try:
        client = MlflowClient(tracking_uri(point.root))
        if report is not None:
            client.log_artifacts(run_id, str(report), "comparison")
            best = pd.read_csv(report / "comparison.csv")["after"].to_numpy(float).max()
            client.log_metric(run_id, "success/best", float(best))
        client.set_terminated(run_id, "FAILED" if failed else "FINISHED")
    except FAILURES as error:
        _complain(point, error)


def _complain(point: Experiment, error: Exception) -> None:
    reason = first_line(error)[:200]
    print(f"MLflow at {tracking_uri(point.root)} cannot be used, going on without it: {reason}", file=sys.stderr)
