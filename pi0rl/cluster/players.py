"""Env and rollout workers, created where the placement says and wired to one another."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray

from pi0rl.cluster.env_worker import EnvWorker
from pi0rl.cluster.placement import Placement
from pi0rl.cluster.playing import Cell, fetch, play
from pi0rl.cluster.rollout_worker import NoiseKey, RolloutWorker
from pi0rl.errors import UserError
from pi0rl.libero.plan import Episode
from pi0rl.libero.slots import EpisodeResult, SlotConfig
from pi0rl.policy.lora import LoraConfig
from pi0rl.policy.sampling import SamplerConfig
from pi0rl.rl.config import RewardConfig


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
    """

    slot: SlotConfig
    workers: int
    slots: int
    stages: int
    sampler: SamplerConfig
    lora: LoraConfig | None = None

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
    """The env and rollout components, ready to play plans with the policy of ``checkpoint``."""

    def __init__(self, config: PlayersConfig, placement: Placement, checkpoint: Path) -> None:
        self._config = config
        slots = config.slots_per_cell
        env_class, rollout_class = ray.remote(EnvWorker), ray.remote(RolloutWorker)
        devices: Sequence[int | None] = placement.rollout or (None,)
        self._rollouts = [
            rollout_class.options(**gpu_options(placement, device)).remote(
                checkpoint,
                config.sampler,
                config.lora,
                1,
                "cpu" if device is None or placement.accelerator == "cpu" else "cuda",
            )
            for device in devices
        ]
        self._envs = [
            env_class.options(num_cpus=1).remote(config.slot, slots, config.stages) for _ in range(config.workers)
        ]
        for started in [rollout.start.remote() for rollout in self._rollouts]:
            fetch(started, "a rollout worker")
        self._cells = [
            Cell(env, self._rollouts[index % len(self._rollouts)], stage)
            for stage in range(config.stages)
            for index, env in enumerate(self._envs)
        ]

    def load(self, weights: Any) -> None:
        """Give all rollout workers new weights (a reference to a dict of tensors, or the dict)."""
        for done in [rollout.load.remote(weights) for rollout in self._rollouts]:
            fetch(done, "a rollout worker")

    def play(
        self,
        plan: Sequence[Episode],
        noise: NoiseKey,
        mode: Literal["train", "eval"],
        record: frozenset[int] = frozenset(),
        on_results: Callable[[Sequence[EpisodeResult]], None] = lambda results: None,
    ) -> list[EpisodeResult]:
        """Play every row of ``plan`` once; results in plan order, and through ``on_results`` as episodes finish."""
        for done in [rollout.begin.remote(noise, mode) for rollout in self._rollouts]:
            fetch(done, "a rollout worker")
        return play(self._cells, plan, record, on_results)

    def trajectories(self, plan: Sequence[Episode], rewards: RewardConfig, max_episode_steps: int) -> list[Any]:
        """References to the trajectories of the plan just played, one list per rollout worker."""
        return [r.trajectories.remote(tuple(plan), rewards, max_episode_steps) for r in self._rollouts]

    def seconds(self) -> dict[str, float]:
        """Mean seconds of an env worker in the plan just played, by activity."""
        parts = [fetch(env.seconds.remote(), "an env worker") for env in self._envs]
        return {key: sum(part[key] for part in parts) / len(parts) for key in parts[0]}


def gpu_options(placement: Placement, device: int | None) -> dict[str, float]:
    """Ray options for a torch component on ``device``: its share of that GPU; no core is reserved, the update and the
    rollouts take turns."""
    return {"num_cpus": 0, "num_gpus": 0 if device is None else 1 / placement.sharers(device)}


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
