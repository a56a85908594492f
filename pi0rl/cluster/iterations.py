"""One iteration of a training: play a plan, update on it, hand the new weights over, validate.

Guards watch it (:mod:`pi0rl.rl.guards`): a collapse sends the run back to its best checkpoint with a smaller step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pi0rl.cluster.checkpoints import Checkpoint, Checkpoints
from pi0rl.cluster.players import Players, Stopwatch
from pi0rl.cluster.policies import Learner
from pi0rl.cluster.rollout_worker import NoiseKey
from pi0rl.cluster.waiting import WAIT_SECONDS
from pi0rl.libero.plan import Episode, independent_plan, training_plan
from pi0rl.rl.config import GuardConfig, RewardConfig, UpdateConfig
from pi0rl.rl.guards import GuardState, learning_rate_scale, observe, rolled_back, validated

# Streams of noise: training and evaluation never share a number.
TRAIN_STREAM, EVALUATION_STREAM, VALIDATION_STREAM = 0, 1, 2


@dataclass(frozen=True)
class LoopConfig:
    """One training run.

    Attributes:
        suites, split, init_state_ids: what is trained on.
        episodes, group_size, iterations: episodes per iteration; GRPO group; iterations.
        max_episode_steps: control steps per training episode.
        seed, scene_seed: of plans and noise; of LIBERO's fixture poses.
        save_interval: iterations between checkpoints (the last one is always saved).
        keep_last: how many of the latest checkpoints are kept, besides the best.
        validation_interval, validation_plan: iterations between validations, and the episodes of one; empty: none.
        final: whether the run ends with its last policy or with the one that validated best.
        guards: when it counts as collapsed, and what then happens.
        train_expert_only, gradient_checkpointing, num_threads: of the actor.
        sharded: whether its weights are spread over its processes.
        offload: whether its moments are in main memory while episodes are played.
        ema_decay: of the average of its weights per iteration, which is what is validated and saved; None: no average.
    """

    suites: tuple[str, ...]
    split: Any
    init_state_ids: range
    episodes: int
    group_size: int
    iterations: int
    max_episode_steps: int
    seed: int
    scene_seed: int
    save_interval: int
    keep_last: int
    validation_interval: int
    validation_plan: tuple[Episode, ...]
    final: Literal["last", "best"]
    train_expert_only: bool
    gradient_checkpointing: bool
    num_threads: int
    sharded: bool
    offload: bool
    ema_decay: float | None
    rewards: RewardConfig
    update: UpdateConfig
    guards: GuardConfig


@dataclass(frozen=True)
class Iteration:
    """What an iteration reports; ``metrics`` and ``events`` repeat to the bit, ``timing`` does not."""

    number: int
    metrics: dict[str, float]
    timing: dict[str, float]
    events: tuple[str, ...] = ()


class Run:
    """The components of a run and what is done with them."""

    def __init__(self, config: LoopConfig, checkpoints: Checkpoints, learner: Learner, players: Players) -> None:
        self._config, self._checkpoints, self._learner, self._players = config, checkpoints, learner, players

    def play(self, number: int) -> Stopwatch:
        """Play the episodes of iteration ``number``; no weight changes."""
        watch, noise = Stopwatch(), NoiseKey(self._config.seed, TRAIN_STREAM, number)
        self._players.play(iteration_plan(self._config, number), noise, "train", version=self._learner.version)
        watch.lap("time/generate_rollouts")
        return watch

    def learn(self, number: int, guard: GuardState, watch: Stopwatch) -> tuple[Iteration, GuardState, bool]:
        """Learn from what was played, with the guards and, where due, the validation; the last value is False where
        the run is over."""
        guards = self._config.guards
        iteration = self._update(number, learning_rate_scale(guard, guards), watch)
        guard, collapse = observe(guard, number, iteration.metrics, guards)
        if collapse is not None:
            if guard.rollbacks == guards.max_rollbacks:
                return replace(iteration, events=(collapse,)), guard, False
            best = self._checkpoints.best(guard, number)
            self.go_on_from(best)
            guard = rolled_back(guard, best.iterations_done, number + 1)
            scale = learning_rate_scale(guard, guards)
            event = (
                f"{collapse}: back to the policy of {best.iterations_done} iterations, learning rates x {scale:g} "
                f"(rollback {guard.rollbacks} of at most {guards.max_rollbacks})"
            )
            iteration = replace(iteration, events=(event,))
        elif self._validation_is_due(number + 1):
            success, metrics, seconds = self.validate(number + 1)
            guard = validated(guard, number + 1, success)
            timing = iteration.timing | {"time/eval": seconds}
            iteration = replace(iteration, metrics=iteration.metrics | metrics, timing=timing)
        if guard.rollbacks:
            iteration = replace(iteration, metrics=iteration.metrics | {"actor/rollbacks": float(guard.rollbacks)})
        return iteration, guard, True

    def validate(self, done: int) -> tuple[float, dict[str, float], float]:
        """Success over the validation plan of the policy after ``done`` iterations, by suite as metrics, seconds."""
        watch, plan = Stopwatch(), self._config.validation_plan
        noise = NoiseKey(self._config.seed, VALIDATION_STREAM, 0)
        with self._learner.as_saved():
            results = self._players.play(plan, noise, "eval", version=self._learner.version)
        watch.lap("time/eval")
        outcomes: dict[str, list[bool]] = {}
        for episode, result in zip(plan, results, strict=True):
            outcomes.setdefault(episode.suite, []).append(result.success)
        metrics = {f"eval/{suite}/success_once": sum(each) / len(each) for suite, each in outcomes.items()}
        success = sum(result.success for result in results) / len(results)
        return success, metrics, watch.seconds["time/eval"]

    def _validation_is_due(self, done: int) -> bool:
        config = self._config
        return bool(config.validation_plan) and (done % config.validation_interval == 0 or done == config.iterations)

    def go_on_from(self, checkpoint: Checkpoint) -> None:
        """Everybody has the weights of ``checkpoint``, the actor its optimiser too."""
        self._learner.resume(checkpoint.directory)

    def save(self, folder: Path, seconds: float = WAIT_SECONDS) -> None:
        """Policy and optimiser into the existing ``folder``."""
        self._learner.save(folder, seconds)

    def _update(self, number: int, lr_scale: float, watch: Stopwatch) -> Iteration:
        config = self._config
        env, acting = self._players.env_seconds(), self._players.acting_seconds()
        plan = iteration_plan(config, number)
        metrics = self._learner.update(number, plan, config.rewards, config.max_episode_steps, lr_scale)
        watch.lap("time/actor_training")
        self._learner.hand_over()
        watch.lap("time/sync_weights")
        return Iteration(number, metrics, _timing(watch.seconds, env, acting, metrics["env/steps"]))


def _timing(laps: dict[str, float], env: list[dict[str, float]], acting: float, steps: float) -> dict[str, float]:
    """Seconds by part of the iteration and activity, and the share of the iteration in which a component worked.

    Args:
        laps: the iteration's parts, one after the other.
        env: seconds of every env worker by activity.
        acting: mean seconds that a rollout worker was acting.
        steps: control steps simulated.
    """
    step, busy = sum(laps.values()), [sum(worker.values()) for worker in env]
    mean = sum(busy) / len(busy)
    return laps | {
        "time/step": step,
        **{f"time/env/{name}": sum(worker[name] for worker in env) / len(env) for name in env[0]},
        "time/rollout/act": acting,
        "perf/env_steps_per_second": steps / step,
        "perf/env_utilization": mean / step,
        "perf/env_slowest": max(busy) / mean,
        "perf/rollout_utilization": acting / step,
        "perf/actor_utilization": laps["time/actor_training"] / step,
    }


def iteration_plan(config: LoopConfig, number: int) -> tuple[Episode, ...]:
    """The episodes of iteration ``number``."""
    draw = independent_plan if config.update.algorithm.compat == "rlinf" else training_plan
    plan = draw(
        config.suites, config.split, config.episodes, config.group_size, config.seed, number, config.init_state_ids
    )
    return tuple(replace(episode, seed=config.scene_seed) for episode in plan)
