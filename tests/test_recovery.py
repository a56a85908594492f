"""Workers that die: their work is done again by others, to the same bytes, and a run that cannot go on says why."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_policies import PREFIX_CRITIC, make_policy
from tiny_training import CPU, QUICKSTART, SMALL

import pi0rl.cluster.loop
import pi0rl.cluster.players
from pi0rl.cluster.env_worker import EnvWorker
from pi0rl.cluster.iterations import Iteration, Run
from pi0rl.cluster.loop import train
from pi0rl.cluster.players import PlayersConfig, open_players
from pi0rl.cluster.rollout_worker import NoiseKey
from pi0rl.cluster.session import ray_session
from pi0rl.cluster.setup import loop_config, players_config
from pi0rl.errors import WorkerFailed
from pi0rl.libero.plan import evaluation_plan
from pi0rl.libero.slots import EpisodeResult, Look
from pi0rl.params import ClusterParams, load_params
from pi0rl.policy.checkpoints import save_policy
from pi0rl.tracking.metrics import METRICS, CsvTable

PLAN = evaluation_plan(["libero_object"], "official", 1, seed=0)[:6]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("recovery") / "policy"
    save_policy(make_policy(PREFIX_CRITIC), directory)
    return directory


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    with ray_session(ClusterParams(), cpus=2):
        yield


@pytest.fixture
def config() -> PlayersConfig:
    params = load_params(QUICKSTART, SMALL)
    return replace(players_config(params, params.env.train), workers=2, slots=4, stages=1)


def kill_one(kind: str) -> None:
    """SIGKILL to one of Ray's processes that hold a ``kind`` of worker."""
    found = [p for p in psutil.Process().children(recursive=True) if p.name().startswith(f"ray::{kind}")]
    os.kill(found[0].pid, signal.SIGKILL)


def outcomes(results: Sequence[EpisodeResult]) -> list[tuple[Any, ...]]:
    return [(result.index, result.success, result.steps, result.final_state) for result in results]


def test_ray_listens_on_the_loopback_device_alone(ray_cluster: None) -> None:
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    sockets = [each for process in processes for each in process.net_connections("inet")]
    listening = {each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN}
    assert listening
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


def test_a_dead_env_worker_is_replaced_and_its_episodes_end_the_same(
    ray_cluster: None, config: PlayersConfig, checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with open_players(config, CPU, checkpoint) as players:
        whole = players.play(PLAN, NoiseKey(0, 0, 0), "train")
        shown: list[EpisodeResult] = []

        def on_results(fresh: Sequence[EpisodeResult]) -> None:
            if not shown:
                kill_one("EnvWorker")
            shown.extend(fresh)

        again = players.play(PLAN, NoiseKey(0, 0, 0), "train", on_results=on_results)
        players.play(PLAN[:1], NoiseKey(0, 0, 0), "train")  # the pool is whole again
    assert outcomes(again) == outcomes(whole)
    assert sorted(result.index for result in shown) == [row.index for row in PLAN]
    assert "is replaced" in capfd.readouterr().err


def test_an_episode_that_kills_its_workers_ends_the_play_with_the_reason(
    ray_cluster: None, config: PlayersConfig, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fatal = PLAN[2].index

    class FragileWorker(EnvWorker):
        def step(self, stage: int, actions: Any) -> Any:
            look, status = super().step(stage, actions)
            if isinstance(look, Look) and fatal in look.episode:
                os.kill(os.getpid(), signal.SIGKILL)
            return look, status

    monkeypatch.setattr(pi0rl.cluster.players, "EnvWorker", FragileWorker)
    shown: list[EpisodeResult] = []
    message = (
        rf"env worker 0 died 3 times without finishing an episode.* it was to play episode .*{fatal} \(libero_object"
    )
    with open_players(config, CPU, checkpoint) as players, pytest.raises(WorkerFailed, match=message):
        players.play(PLAN, NoiseKey(0, 0, 0), "eval", on_results=shown.extend)
    assert fatal not in {result.index for result in shown}


def test_a_dead_policy_costs_the_iterations_since_the_last_checkpoint(
    ray_cluster: None, checkpoint: Path, tmp_path: Path
) -> None:
    params = load_params(QUICKSTART, SMALL)
    loop, players = loop_config(params), players_config(params, params.env.train)

    def run(folder: Path, kills: int) -> tuple[bytes, list[Iteration], list[str]]:
        reports: list[Iteration] = []
        told: list[str] = []

        def on_resume(done: int) -> None:
            del reports[done:]

        def on_iteration(iteration: Iteration) -> None:
            reports.append(iteration)
            if iteration.number == 0 and len(told) < kills:
                kill_one("PolicyWorker")

        policy = train(loop, players, CPU, checkpoint, folder, on_iteration, on_resume, told.append)
        return (policy / "model.safetensors").read_bytes(), reports, told

    straight, reports, _ = run(tmp_path / "straight", kills=0)
    recovered, again, told = run(tmp_path / "killed", kills=1)
    assert recovered == straight
    assert [(report.number, report.metrics) for report in again] == [
        (report.number, report.metrics) for report in reports
    ]
    assert len(told) == 1
    assert "a worker died" in told[0]


def test_an_interruption_costs_what_was_not_finished(
    ray_cluster: None, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At known moments of the second iteration; test_kills.py stops real processes."""
    params = load_params(QUICKSTART, (*SMALL, "runner.save_interval=2"))
    loop, players = loop_config(params), players_config(params, params.env.train)

    def run(folder: Path) -> tuple[bytes, bytes]:
        metrics = CsvTable(folder / "metrics.csv", tuple(METRICS))

        def on_iteration(iteration: Iteration) -> None:
            metrics.append(iteration.number, iteration.metrics)

        policy = train(loop, players, CPU, checkpoint, folder, on_iteration, metrics.resume)
        return (policy / "model.safetensors").read_bytes(), (folder / "metrics.csv").read_bytes()

    straight = run(tmp_path / "straight")
    for name, grace, left in (
        ("play", 60.0, ["stopped_00001"]),
        ("learn", 60.0, ["iteration_00002"]),
        ("learn", 0.02, []),  # the update takes longer
    ):
        folder, method = tmp_path / f"{name} {grace}", getattr(Run, name)

        def interrupted(run: Run, number: int, *arguments: Any, method: Any = method) -> Any:
            if number == 1:
                signal.raise_signal(signal.SIGINT)
            return method(run, number, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(pi0rl.cluster.loop, "GRACE_SECONDS", grace)
            patch.setattr(Run, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                run(folder)
        assert [path.name for path in folder.glob("checkpoints/*")] == left
        assert run(folder) == straight, (name, grace)
        assert [path.name for path in folder.glob("checkpoints/*")] == ["iteration_00002"]


def test_a_run_that_fails_again_and_again_ends_with_the_reason(
    ray_cluster: None, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise WorkerFailed("no worker wants to live")

    monkeypatch.setattr(pi0rl.cluster.loop, "start_policies", fail)
    params = load_params(QUICKSTART, SMALL)
    loop, players, told = loop_config(params), players_config(params, params.env.train), list[str]()
    with pytest.raises(WorkerFailed, match=r"no worker wants to live \(3 failures without a checkpoint in between\)"):
        train(loop, players, CPU, checkpoint, tmp_path, lambda report: None, lambda done: None, told.append)
    assert told == ["no worker wants to live; starting again after 0 iterations"] * 2
