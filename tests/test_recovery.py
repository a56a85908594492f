"""Workers that die: their work is done again by others, to the same bytes, and a run that cannot go on says why."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from tiny_policies import PREFIX_CRITIC, make_policy
from tiny_training import CPU, QUICKSTART, SMALL

import pi0rl.cluster.loop
import pi0rl.cluster.players
import pi0rl.cluster.policies
from pi0rl.cluster.env_worker import EnvWorker
from pi0rl.cluster.iterations import Iteration, Run
from pi0rl.cluster.loop import train
from pi0rl.cluster.placement import Placement
from pi0rl.cluster.players import PlayersConfig, open_players
from pi0rl.cluster.policy_worker import PolicyWorker
from pi0rl.cluster.rollout_worker import NoiseKey, PlayMode
from pi0rl.cluster.session import ray_session
from pi0rl.cluster.setup import loop_config, players_config
from pi0rl.errors import UserError, WorkerFailed
from pi0rl.libero.plan import evaluation_plan
from pi0rl.libero.slots import EpisodeResult, Look
from pi0rl.params import ClusterParams, load_params
from pi0rl.policy.checkpoints import save_policy
from pi0rl.policy.policy import Policy
from pi0rl.tracking.metrics import METRICS, CsvTable

PLAN = evaluation_plan(["libero_object"], "official", 1, seed=0)[:6]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("recovery") / "policy"
    save_policy(make_policy(PREFIX_CRITIC), directory)
    return directory


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    with ray_session(ClusterParams(), cpus=2, logical_gpus=2):
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


def test_the_rollout_acts_with_exactly_the_weights_of_the_actor(
    ray_cluster: None, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two processes, before the first update and after every one."""

    class Watched(PolicyWorker):
        def begin(self, noise: NoiseKey, mode: PlayMode, version: int = 0) -> None:
            super().begin(noise, mode, version)
            self.note("acting", version, self._acting._policy)

        def announce(self, version: int) -> None:
            super().announce(version)
            self.note("learning", version, self._learning.policy)

        def note(self, who: str, version: int, policy: Policy) -> None:
            save_policy(policy, tmp_path / f"{who} {version}")

    monkeypatch.setattr(pi0rl.cluster.policies, "PolicyWorker", Watched)
    apart = Placement(env=(), rollout=(0,), actor=(1,), gpus_per_node=(2,), accelerator="cpu")
    params = load_params(QUICKSTART, (*SMALL, "runner.val_check_interval=1", "runner.val_episodes_per_task=1"))
    loop = loop_config(params)
    loop = replace(loop, validation_plan=loop.validation_plan[:2])
    players = players_config(params, params.env.train)
    train(loop, players, apart, checkpoint, tmp_path / "run", lambda report: None, lambda done: None)
    acting, learning = (
        {path.name.split()[1]: (path / "model.safetensors").read_bytes() for path in tmp_path.glob(f"{who} *")}
        for who in ("acting", "learning")
    )
    assert list(sorted(acting)) == ["0", "1", "2"]
    assert {"0": (checkpoint / "model.safetensors").read_bytes()} | learning == acting
    assert len(set(acting.values())) == 3


@pytest.fixture(scope="module")
def straight(ray_cluster: None, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """What a run without trouble ends with."""
    return end_of_run(checkpoint, tmp_path_factory.mktemp("straight"))


def end_of_run(checkpoint: Path, folder: Path) -> tuple[bytes, bytes]:
    """Weights and metrics of a run that saves its second, last iteration alone; it goes on if it was begun before."""
    params = load_params(QUICKSTART, (*SMALL, "runner.save_interval=2"))
    loop, players = loop_config(params), players_config(params, params.env.train)
    metrics = CsvTable(folder / "metrics.csv", tuple(METRICS))

    def on_iteration(iteration: Iteration) -> None:
        metrics.append(iteration.number, iteration.metrics)

    policy = train(loop, players, CPU, checkpoint, folder, on_iteration, metrics.resume)
    return (policy / "model.safetensors").read_bytes(), (folder / "metrics.csv").read_bytes()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as in a terminal, whatever started the tests or ran before."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("name", "grace", "left"),
    [
        ("play", 60.0, ["stopped_00001"]),
        ("learn", 60.0, ["iteration_00002"]),
        ("learn", 0.02, []),  # the update takes longer
    ],
)
def test_an_interruption_costs_what_was_not_finished(
    interruptible: None,
    straight: tuple[bytes, bytes],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    grace: float,
    left: list[str],
) -> None:
    """At known moments of the second iteration; test_kills.py stops real processes."""
    method = getattr(Run, name)

    def interrupted(run: Run, number: int, *arguments: Any) -> Any:
        if number == 1:
            signal.raise_signal(signal.SIGINT)
        return method(run, number, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pi0rl.cluster.loop, "GRACE_SECONDS", grace)
        patch.setattr(Run, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            end_of_run(checkpoint, tmp_path)
    assert [path.name for path in tmp_path.glob("checkpoints/*")] == left
    assert end_of_run(checkpoint, tmp_path) == straight
    assert [path.name for path in tmp_path.glob("checkpoints/*")] == ["iteration_00002"]


class FullDisk(PolicyWorker):
    """A disk that takes 64 KiB more."""

    def save(self, directory: Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))
        super().save(directory)


class BrokenWeights(PolicyWorker):
    """NaN from the second iteration on."""

    def update(self, iteration: int, *arguments: Any, **options: Any) -> dict[str, float]:
        if iteration == 1:
            next(iter(self._learning._trainable.values())).data.fill_(float("nan"))
        return super().update(iteration, *arguments, **options)


@pytest.mark.parametrize(
    ("worker", "error", "message"),
    [
        (FullDisk, OSError, r"File too large: '.*model.safetensors'"),
        (BrokenWeights, UserError, r"\|log ratio\| reaches nan before any optimiser step"),
    ],
)
def test_a_run_that_cannot_go_on_says_why_and_can_be_resumed(
    straight: tuple[bytes, bytes],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    worker: type[PolicyWorker],
    error: type[Exception],
    message: str,
) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers do not see the tests' folder
    with monkeypatch.context() as patch:
        patch.setattr(pi0rl.cluster.policies, "PolicyWorker", worker)
        with pytest.raises(error, match=message):
            end_of_run(checkpoint, tmp_path)
    assert list(tmp_path.glob("checkpoints/*")) == []
    assert end_of_run(checkpoint, tmp_path) == straight


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
