"""The cluster on real LIBERO, real Ray processes and a small random policy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_training import CPU, QUICKSTART, SMALL

from pi0rl.cluster.iterations import Iteration, iteration_plan
from pi0rl.cluster.loop import train
from pi0rl.cluster.players import open_players
from pi0rl.cluster.rollout_worker import NoiseKey
from pi0rl.cluster.session import ray_session
from pi0rl.cluster.setup import critic_config, loop_config, players_config
from pi0rl.errors import UserError
from pi0rl.libero.plan import evaluation_plan
from pi0rl.libero.slots import EpisodeResult
from pi0rl.libero.suites import suite_tasks
from pi0rl.params import ClusterParams, load_params
from pi0rl.policy.checkpoints import save_policy
from pi0rl.policy.config import TINY
from pi0rl.policy.policy import create_policy
from pi0rl.policy.processing import Normalisation, tiny_processing


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny policy with a value head."""
    prompts = tuple(task.language for task in suite_tasks("libero_object"))
    state = Normalisation("mean_std", (0.0,) * 8, (1.0,) * 8)
    action = Normalisation("mean_std", (0.0,) * 7, (0.3,) * 7)
    critic = critic_config(load_params(QUICKSTART))
    policy = create_policy(TINY, tiny_processing(TINY, state, action, prompts), seed=0, critic=critic)
    directory = tmp_path_factory.mktemp("checkpoint") / "policy"
    save_policy(policy, directory)
    return directory


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    with ray_session(ClusterParams(), cpus=3):
        yield


def test_outcomes_do_not_depend_on_the_number_of_workers(ray_cluster: None, checkpoint: Path) -> None:
    params = load_params(QUICKSTART, SMALL)
    plan = evaluation_plan(["libero_object"], "official", 1, seed=0)[:4]
    outcomes = []
    for workers, stages in ((1, 1), (2, 2)):
        config = replace(players_config(params, params.env.train), workers=workers, stages=stages)
        shown: list[EpisodeResult] = []
        with open_players(config, CPU, checkpoint) as players:
            results = players.play(plan, NoiseKey(0, 0, 0), "train", on_results=shown.extend)
        assert sorted(result.index for result in shown) == [row.index for row in plan]
        outcomes.append([(result.index, result.success, result.steps, result.final_state) for result in results])
    assert outcomes[0] == outcomes[1]


def test_a_resumed_run_ends_in_the_same_bytes(ray_cluster: None, checkpoint: Path, tmp_path: Path) -> None:
    params = load_params(QUICKSTART, SMALL)
    config, players = loop_config(params), players_config(params, params.env.train)
    reports: list[Iteration] = []

    def run(folder: Path, iterations: int) -> bytes:
        shortened = replace(config, iterations=iterations)
        policy = train(shortened, players, CPU, checkpoint, folder, reports.append, lambda done: None)
        return (policy / "model.safetensors").read_bytes()

    straight = run(tmp_path / "straight", 2)
    first = run(tmp_path / "resumed", 1)
    resumed = run(tmp_path / "resumed", 2)
    assert resumed == straight
    assert first != resumed
    metrics = [(report.number, report.metrics) for report in reports]
    assert metrics[:2] == metrics[2:]
    # before the first step of an update, the actor finds exactly the log-probs that the rollout recorded
    assert all(report.metrics["actor/first_ratio_error"] < 1e-3 for report in reports)


def test_a_collapse_goes_back_and_a_resumed_run_does_the_same(
    ray_cluster: None, checkpoint: Path, tmp_path: Path
) -> None:
    """A first update that the guard takes for a collapse; from then on steps are a thousand times as small."""
    collapsing = (
        *(override for override in SMALL if "critic_warmup" not in override),
        "algorithm.collapse_kl=1.0e-4",
        "algorithm.rollback_lr_factor=1.0e-3",
        "algorithm.target_kl=null",
        "actor.optim.adam_warmup_steps=0",
        "actor.optim.lr=1.0e-3",
        "actor.ema_decay=0.5",
        "runner.val_check_interval=1",
        "runner.val_episodes_per_task=1",
    )
    params = load_params(QUICKSTART, collapsing)
    config, players = loop_config(params), players_config(params, params.env.train)
    config = replace(config, validation_plan=config.validation_plan[:2])
    reports: list[Iteration] = []

    def run(folder: Path, iterations: int) -> bytes:
        shortened = replace(config, iterations=iterations)
        policy = train(shortened, players, CPU, checkpoint, folder, reports.append, lambda done: None)
        return (policy / "model.safetensors").read_bytes() + (policy.parent / "state.json").read_bytes()

    straight = run(tmp_path / "straight", 3)
    assert [len(report.events) for report in reports] == [0, 1, 0]  # the critic warms up for one iteration
    went_back = "back to the policy of 1 iterations, learning rates x 0.001 (rollback 1 of at most 2)"
    assert went_back in reports[1].events[0]
    assert ["actor/rollbacks" in report.metrics for report in reports] == [False, True, True]
    assert ["eval/libero_object/success_once" in report.metrics for report in reports] == [True, False, True]
    assert reports[2].metrics["actor/lr"] == pytest.approx(1e-6)
    run(tmp_path / "resumed", 1)
    run(tmp_path / "resumed", 2)
    assert run(tmp_path / "resumed", 3) == straight
    assert [(report.metrics, report.events) for report in reports[3:]] == [
        (report.metrics, report.events) for report in reports[:3]
    ]
    config = replace(config, guards=replace(config.guards, max_rollbacks=0))
    with pytest.raises(UserError, match=r"collapsed in iteration 1 .* after 0 rollbacks .*iteration_00001/policy"):
        run(tmp_path / "ended", 3)


def test_every_iteration_has_a_plan_of_its_own() -> None:
    config = loop_config(load_params(QUICKSTART))
    first, second = iteration_plan(config, 0), iteration_plan(config, 1)
    assert len(first) == len(second) == config.episodes
    assert first == iteration_plan(config, 0)
    assert [row.init_state_id for row in first] != [row.init_state_id for row in second]
    assert {row.task_id for row in first} == set(range(10))
