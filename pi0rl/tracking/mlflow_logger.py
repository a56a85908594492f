"""One MLflow run per experiment, in ``mlflow.db`` beside dvc.yaml unless ``MLFLOW_TRACKING_URI`` says otherwise.

The run's id is kept in ``runs/<experiment>/mlflow_run_id``. A run shows one history: when the files tell another one
than the run does (other params, other code), a new run is begun. Tracking never stops training: what cannot be sent
stays in the CSV files and is sent at the next chance.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before the import: a server that is away costs seconds per iteration, not minutes, nothing is reported home, and no
# bar is drawn over our own lines.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

from mlflow import MlflowClient
from mlflow.entities import DatasetInput, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from sqlalchemy.exc import SQLAlchemyError

from pi0rl.errors import first_line
from pi0rl.experiment import Experiment
from pi0rl.files import replace_text
from pi0rl.params import params_hash
from pi0rl.provenance import commit, versions
from pi0rl.tracking.loggers import Table
from pi0rl.tracking.results import log_results
from pi0rl.tracking.view import VIEW_TAGS

for _noisy in ("mlflow", "alembic"):  # they greet every new database with a page of lines
    logging.getLogger(_noisy).setLevel(logging.WARNING)

# In a run's folder, and in a sweep's
RUN_ID = "mlflow_run_id"

_BATCH_METRICS, _BATCH_OTHERS = 1000, 100  # MLflow's limits per request
FAILURES = (MlflowException, SQLAlchemyError, OSError)


@dataclass
class _History:
    """What a run has of a table: one metric's points by step, and the last step that was sent."""

    name: str
    points: dict[int, float]
    last: int

    def contradicts(self, table: Table) -> bool:
        """Whether ``table`` says something else for a step that the run has; times never repeat and do not count."""
        repeats = not self.name.startswith(("time/", "perf/", "system/"))
        return repeats and any(
            step in self.points and row.get(self.name) != self.points[step] for step, row in table.items()
        )


class MlflowLogger:
    """The MLflow run of an experiment; see the module. No method raises because of the tracking server."""

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        self._uri = tracking_uri(experiment.root)
        self._client: MlflowClient | None = None
        self._run_id = ""
        self._histories: dict[int, _History] = {}
        self._complained = False

    @property
    def behind(self) -> bool:
        """Whether something could not be sent."""
        return self._complained

    @property
    def run_id(self) -> str:
        """The id of the run; empty while the server could not be reached."""
        return self._run_id

    def sync(self, training: Sequence[Table], others: Sequence[Table] = ()) -> None:
        """Send the rows after the last sent step of each table, whose metrics no other table has."""
        self._attempt(lambda client: self._sync(client, [*training, *others]))

    def describe(self, tags: dict[str, str]) -> None:
        """Set tags."""
        entries = [RunTag(name, value[:5000]) for name, value in tags.items()]
        self._attempt(lambda client: self._log(client, tags=entries))

    def add_artifact(self, path: Path, folder: str | None = None) -> None:
        """Upload a file, or a folder with all its content."""
        add = MlflowClient.log_artifacts if path.is_dir() else MlflowClient.log_artifact
        self._attempt(lambda client: add(client, self._run_id, str(path), folder))

    def add_results(self, results: dict[str, Any], hashes: dict[str, str]) -> None:
        """Log what the evaluation found, see :mod:`pi0rl.tracking.results`."""
        self._attempt(lambda client: log_results(client, self._run_id, results, hashes))

    def add_datasets(self, datasets: Sequence[DatasetInput]) -> None:
        """Name what the run was trained and evaluated on."""
        self._attempt(lambda client: client.log_inputs(self._run_id, datasets))

    def close(self, failed: bool) -> None:
        """Mark an interrupted run; a stage that ended well leaves the run open for the next stage."""
        if failed:
            self._attempt(lambda client: client.set_terminated(self._run_id, "KILLED"))

    def finish(self) -> None:
        """The experiment is done."""
        self._attempt(lambda client: client.set_terminated(self._run_id, "FINISHED"))

    def _attempt(self, action: Callable[[MlflowClient], object]) -> None:
        try:
            if self._client is None:
                client = MlflowClient(self._uri)
                self._open(client)
                self._client = client
            action(self._client)
        except FAILURES as error:
            if not self._complained:
                reason = first_line(error)[:200]
                print(f"MLflow at {self._uri} cannot be used, going on without it: {reason}", file=sys.stderr)
            self._complained = True

    def _open(self, client: MlflowClient) -> None:
        """Continue the run of the same params, or begin one."""
        path = self._experiment.run_dir / RUN_ID
        run = find_run(client, path.read_text().strip()) if path.is_file() else None
        if run is None or run.data.tags.get("pi0rl.params_hash") != params_hash(self._experiment.params):
            self._begin(client)
        else:
            self._run_id = run.info.run_id
            client.update_run(self._run_id, status="RUNNING")
            if not run.data.params:  # the server went away between the two
                self._log_params(client)
            if MLFLOW_PARENT_RUN_ID not in run.data.tags:  # or came back only after the sweep had begun
                self._log(client, tags=[RunTag(name, value) for name, value in self._parent().items()])

    def _begin(self, client: MlflowClient) -> None:
        params = self._experiment.params
        run = client.create_run(
            experiment_id(client, params.runner.logger.project_name, self._experiment.root),
            tags=_tags(self._experiment) | self._parent(),
            run_name=self._experiment.name,
        )
        self._run_id = run.info.run_id
        self._experiment.run_dir.mkdir(parents=True, exist_ok=True)
        replace_text(self._experiment.run_dir / RUN_ID, self._run_id + "\n")
        self._log_params(client)

    def _parent(self) -> dict[str, str]:
        """The run of the sweep that this experiment is a point of, if it is one."""
        path = self._experiment.run_dir.parent / RUN_ID
        return {MLFLOW_PARENT_RUN_ID: path.read_text().strip()} if path.is_file() else {}

    def _log_params(self, client: MlflowClient) -> None:
        flat = flatten(self._experiment.params.model_dump(mode="json"))
        self._log(client, params=[Param(name, value[:6000]) for name, value in flat.items()])

    def _sync(self, client: MlflowClient, tables: Sequence[Table]) -> None:
        for number, table in enumerate(tables):
            if table and number not in self._histories:
                self._histories[number] = _history(client, self._run_id, table)
        if any(history.contradicts(tables[number]) for number, history in self._histories.items()):
            self._begin(client)
            self._histories = {number: _History("", {}, -1) for number in self._histories}
        now = int(time.time() * 1000)
        metrics = [
            Metric(name, value, now, step)
            for number, history in self._histories.items()
            for step, row in sorted(tables[number].items())
            if step > history.last
            for name, value in row.items()
            if math.isfinite(value)
        ]
        self._log(client, metrics=metrics)
        for number, history in self._histories.items():
            history.last = max([history.last, *tables[number]])

    def _log(
        self, client: MlflowClient, metrics: Sequence[Metric] = (), params: Sequence[Param] = (), tags: Any = ()
    ) -> None:
        for start in range(0, len(metrics), _BATCH_METRICS):
            client.log_batch(self._run_id, metrics=metrics[start : start + _BATCH_METRICS])
        for start in range(0, max(len(params), len(tags)), _BATCH_OTHERS):
            chunk = slice(start, start + _BATCH_OTHERS)
            client.log_batch(self._run_id, params=params[chunk], tags=tags[chunk])


def tracking_uri(root: Path) -> str:
    """``MLFLOW_TRACKING_URI``, or the SQLite file of the project."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}"


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested sections as ``section.key`` -> text."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            # MLflow allows no comma in a name: component_placement has keys such as env,rollout,actor
            flat[f"{prefix}{key}".replace(",", "/")] = value if isinstance(value, str) else json.dumps(value)
    return flat


def _history(client: MlflowClient, run_id: str, table: Table) -> _History:
    """What the run has of ``table``, judged by its first row's least round number: that differs first."""
    row = next(iter(table.values()))
    name = max(row, key=lambda name: len(repr(row[name])), default="")
    points = {point.step: point.value for point in client.get_metric_history(run_id, name)} if name else {}
    return _History(name, points, max(points, default=-1))


def find_run(client: MlflowClient, run_id: str) -> Run | None:
    """The run with this id; None where another tracking server than last time does not know it."""
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def experiment_id(client: MlflowClient, name: str, root: Path) -> str:
    """The MLflow experiment called ``name``, made where there is none, with its list of runs as the comparison."""
    found = client.get_experiment_by_name(name)
    if found is None:
        local = tracking_uri(root).startswith("sqlite:")
        place = (root / "mlruns").as_uri() if local else None
        return client.create_experiment(name, artifact_location=place, tags=VIEW_TAGS)
    for tag, value in VIEW_TAGS.items():
        if found.tags.get(tag) != value:
            client.set_experiment_tag(found.experiment_id, tag, value)
    return found.experiment_id


def _tags(experiment: Experiment) -> dict[str, str]:
    """What a run is found by later: code, params, versions."""
    checkout = commit(experiment.root)
    return {
        "mlflow.source.name": f"pi0rl run {experiment.reference}",
        "mlflow.source.git.commit": checkout.hash,
        "pi0rl.kind": "experiment",
        "git.dirty": str(checkout.dirty).lower(),
        "pi0rl.params_hash": params_hash(experiment.params),
        "pi0rl.seed": str(experiment.params.seed),
        "pi0rl.suites": ",".join(experiment.params.suites),
        "pi0rl.algorithm": experiment.params.algorithm.name,
        **{f"version.{name}": version for name, version in versions().items()},
    }
