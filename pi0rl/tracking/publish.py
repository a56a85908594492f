"""What a finished experiment has to show beside its training, in every backend: the curve of imitation, the evaluation.
MLflow's run is completed as well, with results, artifacts, and the DVC hashes of its checkpoints.

Where MLflow's server is away, ``runs/<experiment>/mlflow_behind`` stays until it is made up for: by the next
`pi0rl run`, sweep or deployment that meets the experiment, though all its stages are done, or by `pi0rl report`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pi0rl.experiment import Experiment
from pi0rl.tracking.datasets import datasets
from pi0rl.tracking.loggers import Loggers, Table, open_loggers
from pi0rl.tracking.metrics import read_table
from pi0rl.tracking.mlflow_logger import MlflowLogger

# In a run's folder
BEHIND = "mlflow_behind"


def publish(experiment: Experiment) -> None:
    """Bring the backends of ``runner.logger.logger_backends`` up to date with the files of a finished experiment.

    Raises:
        UserError: one of them needs a package that is not installed.
    """
    _send(experiment, open_loggers(experiment))


def catch_up(experiment: Experiment) -> None:
    """Complete the MLflow run of an experiment whose report was made while the server was away; nothing otherwise."""
    if (experiment.run_dir / BEHIND).is_file():
        _send(experiment, Loggers([MlflowLogger(experiment)]))


def _send(experiment: Experiment, loggers: Loggers) -> None:
    results = json.loads((experiment.report_dir / "results.json").read_text())
    train = experiment.stage_dir("train")
    imitation = _table(experiment.stage_dir("sft") / "metrics.csv")
    evaluation: Table = {0: evaluation_metrics(results["rows"])}
    loggers.sync([_table(train / "metrics.csv"), _table(train / "timing.csv")], [imitation, evaluation])
    for logger in loggers:
        if isinstance(logger, MlflowLogger):
            _complete(experiment, logger, results)
    loggers.close(failed=False)


def _complete(experiment: Experiment, logger: MlflowLogger, results: dict[str, Any]) -> None:
    """Give the MLflow run all but its metrics, and mark it finished."""
    hashes = dvc_hashes(experiment)
    logger.describe({f"dvc.{stage}": digest for stage, digest in hashes.items()})
    if "protocol" in results:
        logger.describe({"pi0rl.protocol": results["protocol"]})
    logger.add_datasets(datasets(experiment, results, hashes))
    logger.add_artifact(experiment.run_dir / "params.yaml")
    logger.add_artifact(experiment.report_dir, "report")
    logger.add_results(results, hashes)
    logger.finish()
    if logger.behind:
        (experiment.run_dir / BEHIND).touch()
    else:
        (experiment.run_dir / BEHIND).unlink(missing_ok=True)


def evaluation_metrics(rows: Sequence[dict[str, object]]) -> dict[str, float]:
    """``eval/<policy>/<split>/<suite>/success_once`` of the rows of a results.json."""
    return {
        f"eval/{row['policy']}/{row['split']}/{row['suite']}/success_once": float(str(row["k"])) / float(str(row["n"]))
        for row in rows
    }


def dvc_hashes(experiment: Experiment) -> dict[str, str]:
    """stage -> hash of its folder in DVC's cache, as dvc.lock records it; empty before DVC ran a stage.

    Of stages that points of a sweep share, the point's dvc.lock names only what its own stages read; what made that
    stands in the dvc.lock beside the shared SFT.
    """
    recorded: dict[str, str] = {}
    for lock in (experiment.sft_dir.parent / "dvc.lock", experiment.dvc_file.with_suffix(".lock")):
        if lock.is_file():
            recorded |= _locked(lock)
    folders = {stage: experiment.stage_dir(stage) for stage in ("demos", "sft", "train", "evaluate")}
    paths = {stage: str(folder.relative_to(experiment.root)) for stage, folder in folders.items()}
    return {stage: recorded[path] for stage, path in paths.items() if path in recorded}


def _locked(lock: Path) -> dict[str, str]:
    """Path -> hash of everything that the stages in a dvc.lock read and wrote."""
    entries = yaml.safe_load(lock.read_text())["stages"].values()
    paths = [path for entry in entries for path in (*entry.get("deps", []), *entry.get("outs", []))]
    return {path["path"]: path["md5"] for path in paths if "md5" in path}


def _table(path: Path) -> Table:
    return read_table(path) if path.is_file() else {}
