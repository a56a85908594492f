"""A sweep as it runs: points side by side, one fails, one is killed; the same command then runs what is missing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient
from projects import call, dvc, make_sweep

from pi0rl.experiment import open_experiment
from pi0rl.tracking.publish import dvc_hashes

POINTS = ["lr0.0001-seed0", "lr0.0001-seed1", "lr0.0002-seed0", "lr0.0002-seed1"]


def test_a_sweep_outlives_its_points_and_runs_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    project = make_sweep(tmp_path / "p")
    _on_one_gpu_of_two(project, monkeypatch)
    (project / "fail-lr0.0001-seed1").touch()
    (project / "kill-lr0.0002-seed0").touch()
    result = call("sweep", "quickstart", cwd=project)
    assert result.returncode == 2
    assert "1 of 4 points failed (lr0.0001-seed1: train: no GL driver; install one)" in result.stderr
    assert "the same command runs only these again" in result.stderr
    assert "lr0.0002-seed0 train: killed, by hand or because memory ran out; once more" in result.stdout
    assert (project / "overlapped").exists()
    assert sorted(each.name for each in project.glob("gpu-*")) == ["gpu-0", "gpu-1"]
    assert _ran(project) == [point for point in POINTS if point != "lr0.0001-seed1"]
    assert _compared(project) == _ran(project)

    comparison = project / "reports" / "sweeps" / "quickstart" / "comparison"
    before = (comparison / "comparison.csv").read_text()
    shutil.rmtree(comparison)
    result = call("sweep", "quickstart", "--compare", cwd=project)
    assert "comparison of 3 of 4 points" in result.stdout, result.stderr
    assert (comparison / "comparison.csv").read_text() == before

    (project / "fail-lr0.0001-seed1").unlink()
    (project / "log").unlink()
    result = call("sweep", "quickstart", cwd=project)
    assert result.returncode == 0, result.stderr
    assert _ran(project) == ["lr0.0001-seed1"]
    assert _compared(project) == POINTS
    files = [f"runs/sweeps/quickstart/{point}/dvc.yaml" for point in POINTS]
    assert "up to date" in dvc("status", *files, cwd=project)
    assert "Running stage" not in dvc("repro", *files, cwd=project)
    monkeypatch.chdir(project)
    hashes = [dvc_hashes(open_experiment(str(Path(file).parent))) for file in files]
    assert [each.keys() for each in hashes] == [{"demos", "sft", "train"}] * 4  # those that the points share, too
    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    run = client.get_run((project / "runs/sweeps/quickstart/mlflow_run_id").read_text().strip())
    assert (run.info.status, run.data.metrics["success/best"]) == ("FINISHED", 0.6)


def _on_one_gpu_of_two(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the sweep's points place the policy on GPU 0, on a machine whose driver lists two."""
    sweep = project / "params" / "sweeps" / "quickstart.yaml"
    placed = "overrides: {cluster.component_placement: {env: cpu, rollout: 0, actor: 0}}\n"
    sweep.write_text(sweep.read_text() + placed)
    driver = project / "bin" / "nvidia-smi"
    driver.parent.mkdir()
    driver.write_text("#!/bin/sh\nprintf '0\\n1\\n'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{driver.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def _ran(project: Path) -> list[str]:
    return sorted((project / "log").read_text().split())


def _compared(project: Path) -> list[str]:
    table = pd.read_csv(project / "reports" / "sweeps" / "quickstart" / "comparison" / "comparison.csv")
    return table["point"].tolist()
