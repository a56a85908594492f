"""What MLflow and DVC recorded of a run brings back its bytes after the run's folder is gone, and repeats it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from projects import call, environment, make_project

from pi0rl.errors import UserError
from pi0rl.experiment import Experiment, freeze, open_experiment
from pi0rl.reproduce import Comparison, _results_difference
from pi0rl.restore import restore
from pi0rl.tracking.mlflow_logger import MlflowLogger
from pi0rl.tracking.publish import dvc_hashes


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Experiment, str]:
    """An experiment that DVC ran and MLflow knows, and the run's id."""
    monkeypatch.chdir(make_project(tmp_path / "p"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    experiment = open_experiment("quickstart", ("seed=3",), "runs/three")
    freeze(experiment)
    dvc = [str(Path(sys.executable).parent / "dvc"), "repro", "-q", "runs/three/dvc.yaml"]
    subprocess.run(dvc, env=environment(), check=True)
    logger = MlflowLogger(experiment)
    logger.describe({f"dvc.{stage}": digest for stage, digest in dvc_hashes(experiment).items()})
    logger.add_artifact(experiment.run_dir / "params.yaml")
    logger.finish()
    return experiment, logger.run_id


def test_stages_come_back_after_their_folder_is_gone(finished: tuple[Experiment, str]) -> None:
    experiment, run_id = finished
    before = (experiment.stage_dir("sft") / "file").read_bytes()
    shutil.rmtree(experiment.root / "runs")
    result = call("checkpoint", "restore", run_id, cwd=experiment.root)
    assert result.returncode == 0, result.stderr
    folder = experiment.root / "runs" / "restored" / run_id[:8]
    assert result.stdout == f"restored to {folder}\n"
    assert (folder / "sft" / "file").read_bytes() == before
    assert (folder / "demos" / "params.yaml").is_file()
    with pytest.raises(UserError, match="exists already"):
        restore("three")  # by its name
    with pytest.raises(UserError, match="no such run"):
        restore("four")
    shutil.rmtree(experiment.root / "runs")
    shutil.rmtree(experiment.root / ".dvc" / "cache")
    with pytest.raises(UserError, match="neither in DVC's cache nor in a remote"):
        restore(run_id)


@pytest.mark.slow
def test_a_run_is_repeated_and_compared(finished: tuple[Experiment, str]) -> None:
    experiment, run_id = finished
    result = call("reproduce", run_id, cwd=experiment.root)
    assert result.returncode == 0, result.stderr
    assert "demos: bit-identical\nsft: bit-identical\n" in result.stdout
    (experiment.root / "stage.sh").write_text("mkdir -p $1 && echo other > $1/file")
    shutil.rmtree(experiment.root / "runs" / "reproduced")
    shutil.rmtree(experiment.root / ".dvc" / "cache" / "runs")  # what DVC remembers of earlier runs
    result = call("reproduce", run_id, cwd=experiment.root)
    assert result.returncode == 1
    assert "demos: bit-identical" in result.stdout
    assert "sft: differs: 1 of 1 files: file" in result.stdout


def test_where_an_evaluation_differs_is_said() -> None:
    def results(successes: int) -> dict[str, Any]:
        task = {"split": "held_out", "suite": "libero_object", "task_id": 3, "counts": {"ppo": [successes, 10]}}
        return {"tasks": [task]}

    assert _results_difference(results(7), results(7)) == ""
    difference = _results_difference(results(7), results(6))
    assert difference == "held_out libero_object task 3 ppo: [7, 10] then, [6, 10] now"
    assert str(Comparison("evaluate", difference)).startswith("evaluate: differs: held_out")
    assert str(Comparison("evaluate", "")) == "evaluate: same results"
