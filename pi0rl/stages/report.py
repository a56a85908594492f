"""``reports/<experiment>/``: results.json, Markdown, one HTML page; and the experiment's MLflow run, completed."""

from __future__ import annotations

import sys

from pi0rl.experiment import Experiment
from pi0rl.report.page import write_report
from pi0rl.report.seeds import sibling_runs
from pi0rl.tracking.publish import publish


def run(experiment: Experiment) -> None:
    """Write and publish; what is there is replaced."""
    siblings = sibling_runs(experiment.params, experiment.root / "runs")
    if siblings:
        names = ", ".join(str(folder.relative_to(experiment.root)) for folder in siblings)
        print(f"report: the spread over seeds includes {names}", file=sys.stderr)
    write_report(experiment.run_dir, experiment.report_dir, experiment.reference, siblings, experiment.root / "params")
    publish(experiment)
