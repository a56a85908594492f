"""Processes with the policy: what acts is what was updated, in one process or in several, and actors learn as one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from test_workers import CHUNK, CHUNKS, PLAN, played, quickstart, start_actor, start_rollout
from tiny_policies import PREFIX_CRITIC, make_policy
from torch import Tensor

from pi0rl.cluster.actor_worker import ActorWorker
from pi0rl.cluster.policies import Learner, Policies
from pi0rl.cluster.policy_worker import PolicyWorker
from pi0rl.cluster.rollout_worker import NoiseKey, RolloutWorker
from pi0rl.cluster.session import ray_session
from pi0rl.cluster.setup import loop_config, lora_config, sampler_config
from pi0rl.cluster.waiting import fetch
from pi0rl.errors import WorkerFailed
from pi0rl.params import ClusterParams, Params
from pi0rl.policy.checkpoints import save_policy

STEPS = CHUNKS * CHUNK
# three micro batches per minibatch: two actors do not get equally many
PARAMS = ("actor.micro_batch_size=4", "algorithm.update_epoch=2", "actor.optim.critic_warmup_iterations=0")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("policies") / "policy"
    save_policy(make_policy(PREFIX_CRITIC), directory)
    return directory


@pytest.fixture
def workers_change_their_process() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def rollout_maker(params: Params, checkpoint: Path) -> partial[RolloutWorker]:
    return partial(RolloutWorker, checkpoint, sampler_config(params), lora_config(params), 1, "cpu")


def actor_maker(params: Params, checkpoint: Path, sharded: bool = False) -> partial[ActorWorker]:
    config = loop_config(params)
    settings = sampler_config(params), lora_config(params), config.update, config.train_expert_only
    return partial(ActorWorker, checkpoint, *settings, False, 1, "cpu", sharded=sharded)


@pytest.mark.usefixtures("workers_change_their_process")
def test_one_process_for_both_learns_and_acts_as_two_do(checkpoint: Path) -> None:
    params = quickstart(*PARAMS)
    rollout, actor = start_rollout(params, checkpoint), start_actor(params, checkpoint)
    both = PolicyWorker(rollout_maker(params, checkpoint), actor_maker(params, checkpoint))
    both.start()
    for iteration in range(2):
        apart = played(params, rollout, iteration)
        together = played(params, both, iteration)  # pyright: ignore[reportArgumentType]
        for one, other in zip(apart, together, strict=True):
            assert (one.chains == other.chains).all()
            assert (one.log_probs == other.log_probs).all()
        both.collect(PLAN, params.algorithm, STEPS)
        metrics = both.update(iteration, STEPS)
        assert metrics == actor.update(iteration, STEPS, apart)
        assert metrics["actor/first_ratio_error"] < 1e-4
        assert metrics["actor/optimizer_steps"] > 0
        rollout.load(actor.weights())
        assert _equal(both.weights(), actor.weights())
        with pytest.raises(
            WorkerFailed, match="version 0 is to be played with, a rollout worker has weights that were"
        ):
            played(params, both, iteration)  # pyright: ignore[reportArgumentType]
        both.announce(0)


def test_two_actors_make_the_update_of_one(checkpoint: Path) -> None:
    params = quickstart(*PARAMS)
    parts = played(params, start_rollout(params, checkpoint), iteration=0)
    alone = start_actor(params, checkpoint)
    expected = alone.update(0, STEPS, parts)
    with ray_session(ClusterParams(), cpus=2):
        worker_class = ray.remote(PolicyWorker)
        actors = [worker_class.remote(None, actor_maker(params, checkpoint)) for _ in range(2)]
        rollout = worker_class.remote(rollout_maker(params, checkpoint), None)
        ray.get([worker.start.remote() for worker in (*actors, rollout)])
        address = ray.get(actors[0].rendezvous.remote())
        ray.get([actor.join.remote(address, rank, 2) for rank, actor in enumerate(actors)])
        played(params, _Remote(rollout), iteration=0)  # pyright: ignore[reportArgumentType]
        learner = Learner(Policies((rollout,), tuple(actors)))
        metrics = learner.update(0, PLAN, params.algorithm, STEPS, 1.0)
        learner.hand_over()
        weights: list[dict[str, Tensor]] = [fetch(actor.weights.remote(), "weights") for actor in actors]
        first, second = weights
        with pytest.raises(WorkerFailed, match="version 2 is to be played with, a rollout worker has version 1"):
            fetch(rollout.begin.remote(NoiseKey(0, 0, 1), "train", 2), "the rollout worker")
        played(params, _Remote(rollout, learner.version), iteration=1)  # pyright: ignore[reportArgumentType]
        again = learner.update(1, PLAN, params.algorithm, STEPS, 1.0)
        ray.kill(actors[1])
        with pytest.raises(WorkerFailed, match=r"the actor's update: a worker died|an actor failed in the update"):
            learner.update(2, PLAN, params.algorithm, STEPS, 1.0)
    assert _equal(first, second)
    for name, weight in alone.weights().items():
        torch.testing.assert_close(first[name], weight, rtol=1e-4, atol=1e-6)
    assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-5)
    # what acts has the new weights: the actors find the log-probs that it recorded
    assert again["actor/first_ratio_error"] < 1e-4


class _Remote:
    """A rollout worker in another process, called as if it were here, to act with ``version`` of the weights."""

    def __init__(self, handle: Any, version: int = 0) -> None:
        self._handle, self._version = handle, version

    def begin(self, noise: NoiseKey, mode: str) -> None:
        ray.get(self._handle.begin.remote(noise, mode, self._version))

    def __getattr__(self, method: str) -> object:
        return lambda *arguments: ray.get(getattr(self._handle, method).remote(*arguments))


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
