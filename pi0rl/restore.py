"""Bring back what an MLflow run recorded: its stages' outputs, by their hash in DVC's cache."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from pi0rl.errors import UserError
from pi0rl.experiment import project_root
from pi0rl.tracking.mlflow_logger import tracking_uri

STAGES = ("demos", "sft", "train", "evaluate")


def find_run(run: str) -> Run:
    """The MLflow run with this id or name; raises UserError where there is none, or more than one."""
    uri = tracking_uri(project_root())
    client = MlflowClient(uri)
    try:
        return client.get_run(run)
    except MlflowException:
        experiments = [each.experiment_id for each in client.search_experiments()]
        named = client.search_runs(experiments, f"attributes.run_name = '{run}'") if experiments else []
    if len(named) == 1:
        return named[0]
    reason = "no such run" if not named else f"{len(named)} runs have this name; give the id"
    raise UserError(f"MLflow run {run}: {reason} (at {uri}; another server: set MLFLOW_TRACKING_URI)")


def restore(run: str, output: str | None = None) -> Path:
    """Check out the stages that an MLflow run recorded, from DVC's cache or, where it lacks them, from its remote.

    Args:
        run: id or name of the MLflow run.
        output: the folder to make, which must not exist; left out, ``runs/restored/<run id>``.

    Returns:
        The folder: ``sft/policy`` and ``train/policy`` are the checkpoints.

    Raises:
        UserError: no such run, one without hashes, a folder in the way, or data that is nowhere any more.
    """
    found = find_run(run)
    hashes = recorded_hashes(found)
    if not hashes:
        raise UserError(f"MLflow run {run}: it records no DVC hash; a run is given them when its report is made")
    root = project_root()
    folder = Path(output).absolute() if output else root / "runs" / "restored" / found.info.run_id[:8]
    if folder.exists():
        raise UserError(f"{folder}: exists already; give another folder with --output, or delete it")
    folder.mkdir(parents=True)
    try:
        for stage, digest in hashes.items():
            pointer = folder / f"{stage}.dvc"
            pointer.write_text(yaml.safe_dump({"outs": [{"md5": digest, "hash": "md5", "path": stage}]}))
            if not (_dvc(root, "checkout", pointer) or _dvc(root, "pull", pointer)):
                raise UserError(
                    f"{stage} of MLflow run {run} (md5 {digest}): neither in DVC's cache nor in a remote; "
                    "`pi0rl reproduce` makes it again"
                )
    except BaseException:
        shutil.rmtree(folder)  # all of it or nothing
        raise
    return folder


def recorded_hashes(run: Run) -> dict[str, str]:
    """stage -> hash of its folder in DVC's cache."""
    return {stage: run.data.tags[f"dvc.{stage}"] for stage in STAGES if f"dvc.{stage}" in run.data.tags}


def _dvc(root: Path, command: str, pointer: Path) -> bool:
    dvc = str(Path(sys.executable).parent / "dvc")
    arguments = [dvc, "--wait-for-lock", command, "--quiet", str(pointer)]
    done = subprocess.run(arguments, cwd=root, capture_output=True, text=True)
    return done.returncode == 0
