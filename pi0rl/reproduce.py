"""Run an MLflow run's experiment again, from its recorded params, and say what came out the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from pi0rl.errors import UserError
from pi0rl.experiment import Experiment, open_experiment, project_root
from pi0rl.provenance import commit, versions
from pi0rl.restore import find_run, recorded_hashes
from pi0rl.tracking.mlflow_logger import tracking_uri
from pi0rl.tracking.publish import dvc_hashes

_SHOWN = 5  # names of differing files or results


@dataclass(frozen=True)
class Comparison:
    """What a run and its repetition have in common, ``difference`` empty where it is everything."""

    subject: str
    difference: str

    def __str__(self) -> str:
        same = "same results" if self.subject == "evaluate" else "bit-identical"
        return f"{self.subject}: {f'differs: {self.difference}' if self.difference else same}"


def repetition(run: str) -> tuple[Run, Experiment]:
    """The experiment that repeats an MLflow run, with its recorded params, in ``runs/reproduced/<run id>``."""
    found = find_run(run)
    root = project_root()
    folder = root / "runs" / "reproduced" / found.info.run_id[:8]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        MlflowClient(tracking_uri(root)).download_artifacts(found.info.run_id, "params.yaml", str(folder))
    except MlflowException as error:
        raise UserError(f"MLflow run {run}: it holds no params.yaml; only finished runs can be repeated") from error
    return found, open_experiment(os.path.relpath(folder))


def code_differences(run: Run, root: Path) -> list[str]:
    """What of the code and the packages is not as it was, one line each."""
    tags, here = run.data.tags, commit(root)
    lines = []
    if tags.get("mlflow.source.git.commit") != here.hash:
        lines.append(f"commit {tags.get('mlflow.source.git.commit') or 'unknown'}, here {here}")
    if "true" in (tags.get("git.dirty"), str(here.dirty).lower()):
        lines.append("uncommitted changes, " + ("then" if tags.get("git.dirty") == "true" else "here"))
    recorded = {name.removeprefix("version."): version for name, version in tags.items() if name.startswith("version.")}
    lines += [
        f"{name} {recorded[name]}, here {version}"
        for name, version in versions().items()
        if recorded.get(name, version) != version
    ]
    return lines


def compare(run: Run, experiment: Experiment) -> list[Comparison]:
    """The recorded stages beside those of the repetition: their bytes, and of the evaluation, its results.

    ``evaluate`` also holds videos and the seconds that episodes took, which do not repeat.
    """
    repeated = dvc_hashes(experiment)
    stages = [
        Comparison(stage, _difference(experiment.root, digest, repeated.get(stage, "")))
        for stage, digest in recorded_hashes(run).items()
        if stage != "evaluate"
    ]
    results = experiment.report_dir / "results.json"
    then = _recorded_results(run, experiment.root)
    if then is not None and results.is_file():
        stages.append(Comparison("evaluate", _results_difference(then, json.loads(results.read_text()))))
    return stages


def _difference(root: Path, recorded: str, repeated: str) -> str:
    """Which files of a stage's folder differ, as far as DVC's cache still lists them."""
    if recorded == repeated:
        return ""
    if not repeated:
        return f"{recorded} then, nothing now"
    cache = _cache(root)
    then, now = _listing(cache, recorded), _listing(cache, repeated)
    if then is None or now is None:
        return f"{recorded} then, {repeated} now"
    names = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    return f"{len(names)} of {len(then.keys() | now.keys())} files: {_some(names)}"


def _results_difference(then: dict[str, Any], now: dict[str, Any]) -> str:
    """Policies and tasks that succeeded another number of times."""
    before, after = ({_address(task): task["counts"] for task in each["tasks"]} for each in (then, now))
    differing = [
        f"{task} {policy}: {counts.get(policy)} then, {after.get(task, {}).get(policy)} now"
        for task, counts in before.items()
        for policy in counts
        if counts.get(policy) != after.get(task, {}).get(policy)
    ]
    return _some(differing)


def _address(task: dict[str, Any]) -> str:
    return f"{task['split']} {task['suite']} task {task['task_id']}"


def _some(names: list[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _recorded_results(run: Run, root: Path) -> dict[str, Any] | None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = MlflowClient(tracking_uri(root)).download_artifacts(run.info.run_id, "report/results.json", folder)
        except MlflowException:
            return None  # a run that has no report
        return json.loads(Path(path).read_text())


def _cache(root: Path) -> Path:
    dvc = str(Path(sys.executable).parent / "dvc")
    done = subprocess.run([dvc, "cache", "dir"], cwd=root, capture_output=True, text=True, check=True)
    return root / done.stdout.strip()


def _listing(cache: Path, digest: str) -> dict[str, str] | None:
    """Path below the folder -> hash of the file, of a folder in the cache; None where the cache lacks it."""
    path = cache / "files" / "md5" / digest[:2] / digest[2:]
    if not path.is_file():
        return None
    return {entry["relpath"]: entry["md5"] for entry in json.loads(path.read_text())}
