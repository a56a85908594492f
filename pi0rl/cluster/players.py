"""Env and rollout workers, created where the placement says and wired to one another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray

from pi0rl.cluster.env_worker import EnvWorker
from pi0rl.cluster.placement import Placement
from pi0rl.cluster.playing import Cell, play
from pi0rl.cluster.policies import MakeRollout, start_policies
from pi0rl.cluster.reservation import Reservation
from pi0rl.cluster.rollout_worker import NoiseKey, PlayMode, RolloutWorker
from pi0rl.cluster.waiting import fetch_all, wait_for
from pi0rl.errors import UserError
from pi0rl.libero.plan import Episode
from pi0rl.libero.slots import EpisodeResult, SlotConfig
from pi0rl.policy.lora import LoraConfig
from pi0rl.policy.sampling import SamplerConfig

# A process that starts on a busy machine; on a node that is lost it never would.
RESTART_SECONDS = 300.0


@dataclass(frozen=True)
class PlayersConfig:
    """How many play, and how.

    Attributes:
        slot: how episodes are played.
        workers: env worker processes.
        slots: simulations in all of them together.
        stages: groups per env worker that take turns with inference (``rollout.pipeline_stage_num``).
        sampler: how actions are drawn.
        lora: adapters to put on the policy, in training: saved policies have none.
        compiled: whether the policy's layers are compiled.
    """

    slot: SlotConfig
    workers: int
    slots: int
    stages: int
    sampler: SamplerConfig
    lora: LoraConfig | None = None
    compiled: bool = False

    @property
    def slots_per_cell(self) -> int:
        """Simulations that are inferred together."""
        count, rest = divmod(self.slots, self.workers * self.stages)
        if rest:
            raise UserError(
                f"{self.slots} slots do not divide into {self.workers} env workers x {self.stages} pipeline stages; "
                "change total_num_envs, workers or rollout.pipeline_stage_num"
            )
        return count


class Players:
    """The env component and those that act for it, ready to play plans.

    Args:
        config: how many play, and how.
        room: where the env workers run.
        rollouts: Ray's handles of the processes that act, see :mod:`pi0rl.cluster.policies`.
    """

    def __init__(self, config: PlayersConfig, room: Reservation, rollouts: Sequence[Any]) -> None:
        self._rollouts = tuple(rollouts)
        self._envs = _Envs(config, room)
        self._cells = [
            Cell(number, self._rollouts[number % len(self._rollouts)], stage)
            for stage in range(config.stages)
            for number in range(config.workers)
        ]

    def load(self, weights: Any, version: int) -> None:
        """Give all rollout workers new weights (a reference to a dict of tensors, or the dict) under a number."""
        loads = [rollout.load.remote(weights, version) for rollout in self._rollouts]
        fetch_all(loads, "the rollout workers to take weights")

    def play(
        self,
        plan: Sequence[Episode],
        noise: NoiseKey,
        mode: PlayMode,
        record: frozenset[int] = frozenset(),
        on_results: Callable[[Sequence[EpisodeResult]], None] = lambda results: None,
        version: int = 0,
    ) -> list[EpisodeResult]:
        """Play every row of ``plan`` once; results in plan order, and through ``on_results`` as episodes finish.

        A rollout worker with another ``version`` of the weights refuses; 0 are those that it began with.
        """
        begins = [rollout.begin.remote(noise, mode, version) for rollout in self._rollouts]
        fetch_all(begins, "the rollout workers to begin")
        return play(self._cells, self._envs, plan, record, on_results)

    def env_seconds(self) -> list[dict[str, float]]:
        """Seconds of every env worker in the plan just played, by activity."""
        return fetch_all([env.seconds.remote() for env in self._envs.workers], "the env workers' times")

    def acting_seconds(self) -> float:
        """Mean seconds that a rollout worker was acting in the plan just played."""
        parts = fetch_all([rollout.acting_seconds.remote() for rollout in self._rollouts], "the rollout workers' times")
        return sum(parts) / len(parts)


class _Envs:
    """The env workers by number; see :class:`pi0rl.cluster.playing.EnvPool`."""

    def __init__(self, config: PlayersConfig, room: Reservation) -> None:
        self._config, self._room = config, room
        self.workers = [self._start(number) for number in range(config.workers)]

    def worker(self, number: int) -> Any:
        return self.workers[number]

    def replace(self, number: int) -> None:
        ray.kill(self.workers[number])
        self.workers[number] = self._start(number)
        started = f"env worker {number} to start again; is its node lost?"
        wait_for([self.workers[number].seconds.remote()], started, RESTART_SECONDS)

    def _start(self, number: int) -> Any:
        config = self._config
        env_class = ray.remote(EnvWorker).options(**self._room.env_options(number))
        return env_class.remote(config.slot, config.slots_per_cell, config.stages, self._room.env_gpu(number))


@contextmanager
def open_players(config: PlayersConfig, placement: Placement, checkpoint: Path) -> Iterator[Players]:
    """Players of the policy in ``checkpoint``, without an actor; their processes end with the block."""
    with Reservation(placement, config.workers, ("env", "rollout")) as room:
        yield Players(config, room, start_policies(room, rollout_maker(config, checkpoint)).rollouts)


def rollout_maker(config: PlayersConfig, checkpoint: Path) -> MakeRollout:
    """What makes the rollout worker of a device, with the policy of ``checkpoint``."""
    limit = config.slot.max_episode_steps
    made = partial(RolloutWorker, checkpoint, config.sampler, config.lora, 1)
    return partial(made, compiled=config.compiled, max_episode_steps=limit)


class Stopwatch:
    """Seconds per named part of an iteration."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Count the time since the last lap to ``name``."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
