"""Metrics files repeat and resume; an MLflow run shows one history, whatever was interrupted or away."""

from __future__ import annotations

from pathlib import Path

import pytest
from projects import make_project

from pi0rl.experiment import Experiment, open_experiment
from pi0rl.tracking.metrics import METRICS, MetricsWriter, read_table
from pi0rl.tracking.mlflow_logger import MlflowLogger, flatten, tracking_uri
from pi0rl.tracking.publish import dvc_hashes, evaluation_metrics


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    monkeypatch.chdir(make_project(tmp_path / "p"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody answers there
    return open_experiment("quickstart")


def _train(experiment: Experiment, start: int, end: int, offset: float = 0.0) -> None:
    with MetricsWriter(experiment) as writer:
        writer.resume(start)
        for number in range(start, end):
            metrics = {"env/success_once": offset + number / 7, "actor/loss": float("nan") if number == 0 else 0.5}
            writer.write(number, metrics, {"time/step": 1.5})


def test_a_resumed_file_equals_an_uninterrupted_one(experiment: Experiment) -> None:
    metrics = experiment.stage_dir("train") / "metrics.csv"
    _train(experiment, 0, 6)
    whole = metrics.read_bytes()
    _train(experiment, 0, 5)
    _train(experiment, 3, 6)
    assert metrics.read_bytes() == whole
    assert metrics.read_text().splitlines()[:2] == ["iteration,env/success_once,actor/loss", "0,0.0,"]
    assert read_table(metrics)[5]["env/success_once"] == 5 / 7
    assert read_table(metrics.with_name("timing.csv"))[5] == {"time/step": 1.5}


def test_every_metric_has_an_explanation(experiment: Experiment) -> None:
    assert all(METRICS.values())
    with MetricsWriter(experiment) as writer, pytest.raises(ValueError, match="actor/secret"):
        writer.write(0, {"actor/secret": 1.0}, {})


def test_a_tracking_server_that_is_away_is_said_once(
    experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    _train(experiment, 0, 3)
    assert capsys.readouterr().err.count("going on without it") == 1


def test_an_mlflow_run_has_one_history(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    _train(experiment, 0, 2)  # the server is away
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    _train(experiment, 2, 5)
    _train(experiment, 3, 6)  # interrupted after iteration 4, resumed from the checkpoint of iteration 3
    first = _run_id(experiment)
    assert _history(experiment) == [(number, number / 7) for number in range(6)]
    _train(experiment, 0, 2, offset=0.25)  # other code: other numbers
    assert _run_id(experiment) != first
    assert _history(experiment) == [(0, 0.25), (1, 0.25 + 1 / 7)]
    logger = MlflowLogger(experiment)
    logger.describe({"dvc.train": "abc.dir"})
    logger.finish()
    run = _client(experiment).get_run(_run_id(experiment))
    assert run.info.status == "FINISHED"
    assert run.data.params["actor.model.num_steps"] == "4"
    assert run.data.tags["dvc.train"] == "abc.dir"


def _client(experiment: Experiment):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri(experiment.root))


def _run_id(experiment: Experiment) -> str:
    return (experiment.run_dir / "mlflow_run_id").read_text().strip()


def _history(experiment: Experiment) -> list[tuple[int, float]]:
    points = _client(experiment).get_metric_history(_run_id(experiment), "env/success_once")
    return [(point.step, point.value) for point in points]


def test_params_become_flat_names_that_mlflow_accepts() -> None:
    tree = {"cluster": {"component_placement": {"env,rollout,actor": "cpu"}}, "seed": 0, "suites": ["libero_object"]}
    assert flatten(tree) == {
        "cluster.component_placement.env/rollout/actor": "cpu",
        "seed": "0",
        "suites": '["libero_object"]',
    }


def test_results_and_hashes_for_the_run(experiment: Experiment) -> None:
    row = {"policy": "ppo", "split": "held_out", "suite": "libero_object", "k": 3, "n": 4}
    assert evaluation_metrics([row]) == {"eval/ppo/held_out/libero_object/success_once": 0.75}
    assert dvc_hashes(experiment) == {}
    lock = "stages: {train: {outs: [{path: runs/quickstart/train, md5: abc.dir}]}, demos: {cmd: x}}"
    (experiment.root / "dvc.lock").write_text(lock)
    assert dvc_hashes(experiment) == {"train": "abc.dir"}
