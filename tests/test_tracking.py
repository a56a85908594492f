"""Metrics files repeat and resume; a run shows one history, whatever was interrupted or away; alarms are raised."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from projects import make_project

from pi0rl.errors import UserError
from pi0rl.experiment import Experiment, open_experiment, resolve
from pi0rl.stages import train
from pi0rl.tracking.alarms import WINDOW, alarms
from pi0rl.tracking.loggers import Table, open_loggers
from pi0rl.tracking.metrics import METRICS, MetricsWriter, read_alarms, read_table, unexplained
from pi0rl.tracking.mlflow_logger import MlflowLogger, flatten, tracking_uri
from pi0rl.tracking.publish import catch_up, dvc_hashes, evaluation_metrics, publish
from pi0rl.tracking.sweep import begin_sweep
from pi0rl.tracking.system import gpu_metrics
from pi0rl.tracking.terminal import TrainingView, plain_line, sparkline


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
    timing = read_table(metrics.with_name("timing.csv"))[5]
    assert timing["time/step"] == 1.5
    assert 0 < timing["system/system_memory_usage_percentage"] <= 100


def test_every_metric_has_an_explanation(experiment: Experiment) -> None:
    assert all(METRICS.values())
    with MetricsWriter(experiment) as writer, pytest.raises(ValueError, match="actor/secret"):
        writer.write(0, {"actor/secret": 1.0}, {})


def test_the_docs_explain_every_metric_in_the_same_words() -> None:
    page = (Path(__file__).parents[1] / "docs" / "algorithm.md").read_text()
    assert [name for name, meaning in METRICS.items() if f"| `{name}` | {meaning} |" not in page] == []


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


def test_gpus_are_read_from_the_drivers_table() -> None:
    table = "97, 40960, 81920, 412.50\n0, 10, 81920, [N/A]\n"
    assert gpu_metrics(table) == {
        "system/gpu_0_utilization_percentage": 97.0,
        "system/gpu_0_memory_usage_megabytes": pytest.approx(42949.67),
        "system/gpu_0_memory_usage_percentage": 50.0,
        "system/gpu_0_power_usage_watts": 412.5,
        "system/gpu_1_utilization_percentage": 0.0,
        "system/gpu_1_memory_usage_megabytes": pytest.approx(10.48576),
        "system/gpu_1_memory_usage_percentage": pytest.approx(0.01220703125),
    }
    assert gpu_metrics("") == {}


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
    metrics = evaluation_metrics([row])
    assert metrics == {"eval/ppo/held_out/libero_object/success_once": 0.75}
    assert unexplained(metrics) == []
    assert dvc_hashes(experiment) == {}
    lock = "stages: {train: {outs: [{path: runs/quickstart/train, md5: abc.dir}]}, demos: {cmd: x}}"
    (experiment.root / "dvc.lock").write_text(lock)
    assert dvc_hashes(experiment) == {"train": "abc.dir"}


def test_results_become_columns_a_table_nested_runs_and_a_champion(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    client = _client(experiment)
    folder = experiment.run_dir.parent
    begin_sweep("s", folder, experiment)
    for success, p, champion in ((60, 0.20, None), (70, 0.01, 70), (65, 0.01, 70), (80, 0.001, 80)):
        (experiment.run_dir / "mlflow_run_id").unlink(missing_ok=True)
        logger = MlflowLogger(experiment)
        for _ in range(2):  # published twice: nothing twice
            logger.add_results(_results(success, p, "abc"), {"train": f"{success}.dir"})
        logger.finish()
        assert client.get_model_version_by_alias("libero_object-abc", "candidate").tags["dvc.train"] == f"{success}.dir"
        reigning = client.get_registered_model("libero_object-abc").aliases.get("champion")
        version = None if reigning is None else client.get_model_version("libero_object-abc", reigning)
        assert champion == (None if version is None else 100 * float(version.tags["success"]))
    run = client.get_run(logger.run_id)
    assert run.data.metrics["success/ppo"] == run.data.metrics["after"] == 0.8
    assert (run.data.metrics["before"], run.data.metrics["change"]) == (0.5, 0.3)
    assert run.data.tags["mlflow.parentRunId"] == (folder / "mlflow_run_id").read_text().strip()
    assert len(client.load_table(run.info.experiment_id, "results.json", [run.info.run_id])) == 3
    nested = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")
    (suite,) = nested
    assert suite.info.run_name == "libero_object"
    assert suite.data.metrics["success/ppo"] == 0.8
    assert suite.data.metrics["success/sft/official"] == 0.1
    assert suite.data.tags["pi0rl.seed"] == "0"


def test_another_protocol_is_another_exam(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    for success, protocol in ((90, "abc"), (60, "def")):
        (experiment.run_dir / "mlflow_run_id").unlink(missing_ok=True)
        MlflowLogger(experiment).add_results(_results(success, 0.01, protocol), {"train": f"{success}.dir"})
    champion = _client(experiment).get_model_version_by_alias("libero_object-def", "champion")
    assert champion.tags["success"] == "0.6"


def _results(success: int, p: float, protocol: str) -> dict[str, Any]:
    """The results.json of 100 held-out episodes, of which the start solves 50, and some official ones."""
    rows = [
        {"policy": name, "split": split, "suite": "libero_object", "k": k, "n": 100, "wilson": [0.3, 0.6]}
        for name, split, k in (("sft", "held_out", 50), ("ppo", "held_out", success), ("sft", "official", 10))
    ]
    change = {"before": "sft", "after": "ppo", "split": "held_out", "change": success / 100 - 0.5, "mcnemar_p": p}
    comparisons = [{"suite": suite, **change} for suite in ("libero_object", "all")]
    return {"rows": rows, "comparisons": comparisons, "protocol": protocol}


def test_what_a_finished_run_missed_is_sent_when_the_server_is_back(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    resolve(experiment)
    _train(experiment, 0, 2)
    experiment.report_dir.mkdir(parents=True)
    (experiment.report_dir / "results.json").write_text(json.dumps(_results(70, 0.01, "abc")))
    hashes = "{path: runs/quickstart/train, md5: abc.dir}, {path: runs/quickstart/demos, md5: def.dir}"
    (experiment.root / "dvc.lock").write_text(f"stages: {{train: {{outs: [{hashes}]}}}}")
    capsys.readouterr()
    publish(experiment)
    assert capsys.readouterr().err.count("going on without it") == 1
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    begin_sweep("s", experiment.run_dir.parent, experiment)
    catch_up(experiment)
    assert [step for step, _ in _history(experiment)] == [0, 1]
    run = _client(experiment).get_run(_run_id(experiment))
    assert run.data.tags["pi0rl.protocol"] == "abc"
    assert run.data.tags["mlflow.parentRunId"] == (experiment.run_dir.parent / "mlflow_run_id").read_text().strip()
    datasets = {each.dataset.name: each.dataset.digest for each in run.inputs.dataset_inputs}
    assert datasets == {
        "demonstrations of libero_object": "def.dir",
        "libero_object held_out": "abc",
        "libero_object official": "abc",
    }
    catch_up(experiment)  # once
    assert not (experiment.run_dir / "mlflow_behind").exists()


def _calm(iterations: int) -> tuple[Table, Table]:
    metrics = {
        step: {"env/success_once": 0.5, "actor/approx_kl_k2": 0.01, "env/steps": 100.0} for step in range(iterations)
    }
    timing = {
        step: {"time/step": 10.0, "time/generate_rollouts": 8.0, "time/env/render": 6.0} for step in range(iterations)
    }
    return metrics, timing


def _kinds(iteration: int, metrics: Table, timing: Table, **latest: float) -> list[str]:
    values = metrics[iteration] | {name.replace("__", "/"): value for name, value in latest.items()}
    return [alarm.kind for alarm in alarms(iteration, values, metrics, timing, target_kl=0.2)]


def test_alarms_name_what_is_wrong_and_only_that() -> None:
    metrics, timing = _calm(2 * WINDOW)
    last = 2 * WINDOW - 1
    assert _kinds(last, metrics, timing) == []
    assert _kinds(last, metrics, timing, actor__loss=float("nan")) == ["not finite"]
    assert _kinds(0, metrics, timing, actor__loss=float("nan")) == ["not finite"]  # from the first iteration on
    assert _kinds(last, metrics, timing, actor__skipped_steps=2.0) == ["not finite"]
    assert _kinds(last, metrics, timing, actor__approx_kl_k2=0.41) == ["KL"]
    assert _kinds(last, metrics, timing | {last: timing[last] | {"perf/env_slowest": 1.7}}) == ["slow worker"]
    assert _kinds(last, metrics, timing | {last: timing[last] | {"time/step": 30.0}}) == ["slow iteration"]
    for step in range(WINDOW, 2 * WINDOW):
        metrics[step]["env/success_once"] = 0.3
    assert _kinds(last, metrics, timing) == ["success drop"]


def test_alarms_are_shown_and_kept_over_a_resume(experiment: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsWriter(experiment) as writer:
        writer.resume(0)
        for number in range(4):
            writer.write(number, {"actor/approx_kl_k2": 9.0 if number in (1, 3) else 0.0}, {"time/step": 1.0})
    assert capsys.readouterr().err.count("ALARM (KL) at iteration") == 2
    path = experiment.stage_dir("train") / "alarms.csv"
    assert [alarm.iteration for alarm in read_alarms(path)] == [1, 3]
    assert read_table(path.with_name("timing.csv"))[3]["perf/alarms"] == 1
    _train(experiment, 2, 3)
    assert [alarm.iteration for alarm in read_alarms(path)] == [1]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_view_is_a_panel_in_a_terminal_and_lines_in_a_log() -> None:
    metrics, timing = _calm(3)
    log, terminal = io.StringIO(), _Terminal()
    for stream in (log, terminal):
        view = TrainingView(30, stream)
        view.show({0: metrics[0]}, {0: timing[0]}, ())
        view.show(metrics, timing, alarms(2, {"actor/loss": float("inf")}, metrics, timing, None))
    first, alarm, second = log.getvalue().splitlines()
    assert "\x1b" not in log.getvalue()
    assert first.startswith("train: iteration 1/30, 0:10, 4:50 left; success 0.50")
    assert second.startswith("train: iteration 3/30, 0:30, 4:30 left; success 0.50")
    assert "env workers 75% busy" in second
    assert "KL 0.000" in second
    metrics[2]["rollout/samples"] = 0.0
    assert "success 0.50, length 0, all groups filtered, nothing to learn from, " in plain_line(30, metrics, timing)
    assert alarm == "ALARM (not finite) at iteration 2: actor/loss"
    assert terminal.getvalue().count("\x1b[5F\x1b[J") == 1
    assert sparkline([0.0, 0.5, 1.0], 0, 1) == "▁▅█"


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_optional_backends_log_offline_or_say_what_to_install(name: str, experiment: Experiment) -> None:
    logged = open_experiment("quickstart", (f"runner.logger.logger_backends=[{name},tensorboard]",), "runs/logged")
    if importlib.util.find_spec(name) is None:
        with pytest.raises(UserError, match=rf"{name}, which is not installed; pip install 'pi0rl\[{name}\]'"):
            open_loggers(logged)
        pytest.skip(f"{name} is not installed")
    _train(logged, 0, 2)
    _train(logged, 1, 4)
    (run,) = [path for path in (logged.run_dir / name).rglob("*") if path.suffix in (".wandb", ".swanlab")]
    deadline = time.monotonic() + 30
    while run.stat().st_size <= 1000 and time.monotonic() < deadline:  # W&B's own process writes a moment later
        time.sleep(0.1)
    assert run.stat().st_size > 1000


def test_training_says_which_of_rlinfs_keys_have_nothing_to_do(
    experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ("runner.logger.log_path", "runner.logger.experiment_name", "video_cfg.video_base_dir")
    settings = (*(f"{key}=mine" for key in keys), "env.enable_offload=true")
    with pytest.raises(UserError, match="run `pi0rl sft` first"):
        train.run(open_experiment("quickstart", settings, "runs/logged"))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["env.enable_offload", *keys]
    assert lines[1] == "train: runner.logger.log_path: nothing to do; all files are in runs/logged"
    with pytest.raises(UserError, match="did you mean 'libero_goal'"):  # now, not when training is over
        train.run(open_experiment("quickstart", ("evaluation.suites=[libero_object,libero_gaol]",), "runs/logged"))


def test_tensorboard_reads_the_same_names(experiment: Experiment) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged = open_experiment("quickstart", ("runner.logger.logger_backends=[tensorboard]",), "runs/logged")
    _train(logged, 0, 3)
    _train(logged, 2, 5)
    (folder,) = {path.parent for path in logged.run_dir.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder)).Reload()
    points = [(event.step, event.value) for event in events.Scalars("env/success_once")]
    assert points == [(number, pytest.approx(number / 7)) for number in range(5)]
    assert {"env/success_once", "actor/loss", "time/step"} <= set(events.Tags()["scalars"])


def test_a_finished_experiment_shows_imitation_and_evaluation_in_every_backend(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    logged = open_experiment("quickstart", ("runner.logger.logger_backends=[mlflow,tensorboard]",), "runs/logged")
    resolve(logged)
    _train(logged, 0, 2)
    logged.stage_dir("sft").mkdir()
    (logged.stage_dir("sft") / "metrics.csv").write_text("step,sft/loss,sft/val_loss\n1,0.5,\n2,0.25,0.125\n")
    logged.report_dir.mkdir(parents=True)
    (logged.report_dir / "results.json").write_text(json.dumps(_results(70, 0.01, "abc")))
    for _ in range(2):  # published twice: nothing twice
        publish(logged)
    final = "eval/ppo/held_out/libero_object/success_once"
    expected = {"sft/loss": [(1, 0.5), (2, 0.25)], "sft/val_loss": [(2, 0.125)], final: [(0, pytest.approx(0.7))]}
    expected["env/success_once"] = [(0, 0.0), (1, pytest.approx(1 / 7))]
    client, run = _client(logged), _run_id(logged)
    events = EventAccumulator(str(logged.run_dir / "tensorboard")).Reload()
    for name, points in expected.items():
        assert [(event.step, event.value) for event in events.Scalars(name)] == points
        assert [(point.step, point.value) for point in client.get_metric_history(run, name)] == points


def test_a_resumed_wandb_run_has_every_row_once(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, dict[str, float]]] = []
    axes: dict[str, str] = {}
    run = SimpleNamespace(
        log=lambda values, step: sent.append((step, values)),
        define_metric=lambda name, step_metric: axes.update({name: step_metric}),
        finish=lambda exit_code: None,
    )

    def init(**settings: object) -> SimpleNamespace:
        run.step = sent[-1][0] + 1 if sent else 0  # as W&B's server has it
        return run

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=lambda **settings: None))
    monkeypatch.delitem(sys.modules, "pi0rl.tracking.wandb_logger", raising=False)
    from pi0rl.tracking.wandb_logger import WandbLogger

    del sys.modules["pi0rl.tracking.wandb_logger"]  # nobody else is to have the one with the double
    training: list[Table] = [{0: {"actor/loss": 0.5}, 1: {"actor/loss": 0.4}}, {0: {"time/step": 9.0}}]
    others: list[Table] = [{5: {"sft/loss": 3.0}, 6: {"sft/loss": 2.0}}, {0: {"eval/ppo/success_once": 0.7}}]
    WandbLogger(experiment).sync([{0: training[0][0]}, training[1]])
    for _ in range(2):
        WandbLogger(experiment).sync(training, others)
    assert sent == [
        (0, {"actor/loss": 0.5, "time/step": 9.0}),
        (1, {"actor/loss": 0.4}),
        (2, {"sft/loss": 3.0, "sft/step": 5}),
        (3, {"sft/loss": 2.0, "sft/step": 6}),
        (4, {"eval/ppo/success_once": 0.7, "eval/step": 0}),
    ]
    assert axes == {"sft/*": "sft/step", "eval/*": "eval/step"}


def test_several_backends_show_the_same_names_and_values(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    override = "runner.logger.logger_backends=[tensorboard,mlflow,tensorboard]"  # each once
    logged = open_experiment("quickstart", (override,), "runs/logged")
    _train(logged, 0, 3)
    events = EventAccumulator(str(logged.run_dir / "tensorboard")).Reload()
    shown = {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}
    client = _client(logged)
    run = client.get_run(_run_id(logged))
    histories = {name: client.get_metric_history(_run_id(logged), name) for name in run.data.metrics}
    assert shown == {
        name: {point.step: pytest.approx(point.value, rel=1e-6) for point in points}
        for name, points in histories.items()
    }
