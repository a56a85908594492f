"""What a flow shows in Prefect's pages: how far a stage is, the results, where the report and the MLflow run are."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import pandas as pd
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from pi0rl.experiment import Experiment
from pi0rl.tracking.mlflow_logger import RUN_ID, tracking_uri

# `train: iteration 3/28, ...`, as pi0rl.progress writes it
_PROGRESS = re.compile(r"^[\w ]+: \w+ (\d+)/(\d+)")
_SECONDS = 5.0  # between two updates


class StageProgress:
    """A progress bar that follows a stage's lines."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._artifact: UUID | None = None
        self._shown = 0.0

    def __call__(self, line: str) -> None:
        found = _PROGRESS.match(line)
        if found is None or time.monotonic() - self._shown < _SECONDS:
            return
        self._shown = time.monotonic()
        percent = 100.0 * int(found[1]) / max(1, int(found[2]))
        if self._artifact is None:
            artifact = create_progress_artifact(percent, key=f"{self._stage}-progress", description=line)
            self._artifact = cast(UUID, artifact)  # called from a task's thread, it has been awaited
        else:
            update_progress_artifact(self._artifact, percent, description=line)


def show_results(experiment: Experiment) -> None:
    """The rows of results.json as a table, and links to the report and the MLflow run."""
    results = experiment.report_dir / "results.json"
    if not results.is_file():
        return  # an experiment without a report: the shared stages of a sweep
    rows: list[dict[str, Any]] = json.loads(results.read_text())["rows"]
    table = [{**row, "wilson": "{:.3f} to {:.3f}".format(*row["wilson"])} for row in rows]
    create_table_artifact(table, key=_key(experiment.name), description=f"Results of {experiment.reference}")
    create_markdown_artifact(_links(experiment), key=_key(f"{experiment.name}-links"))


def show_comparison(sweep: str, report: Path) -> None:
    """The comparison of a sweep's points as a table."""
    table = pd.read_csv(report / "comparison.csv")
    rows = table.astype(object).to_dict(orient="records")
    create_table_artifact(rows, key=_key(f"sweep-{sweep}"), description=f"Points of sweep {sweep}")


def _links(experiment: Experiment) -> str:
    run_id = experiment.run_dir / RUN_ID
    lines = [f"- report: [{experiment.name}]({(experiment.report_dir / 'index.html').as_uri()})"]
    if run_id.is_file():
        lines.append(f"- MLflow run: `{run_id.read_text().strip()}` at {tracking_uri(experiment.root)}")
    return "\n".join(lines)


def _key(name: str) -> str:
    """Prefect's keys hold small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
