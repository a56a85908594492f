"""The training loop: play a plan, update on it, hand the new weights over, save; killed anywhere, it resumes.

Guards watch it (:mod:`pi0rl.rl.guards`): a collapse sends the run back to its best checkpoint with a smaller step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import ray

from pi0rl.cluster.actor_worker import ActorWorker
from pi0rl.cluster.checkpoints import Checkpoint, Checkpoints
from pi0rl.cluster.placement import Placement
from pi0rl.cluster.players import Players, PlayersConfig, Stopwatch, gpu_options
from pi0rl.cluster.playing import UPDATE_SECONDS, fetch
from pi0rl.cluster.rollout_worker import NoiseKey
from pi0rl.errors import UserError
from pi0rl.libero.plan import Episode, training_plan
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


def _to_stderr(line: str) -> None:
    print(f"train: {line}", file=sys.stderr)


def train(
    config: LoopConfig,
    players_config: PlayersConfig,
    placement: Placement,
    start: Path,
    directory: Path,
    on_iteration: Callable[[Iteration], None],
    on_resume: Callable[[int], None],
    notice: Callable[[str], None] = _to_stderr,
) -> Path:
    """Run ``config.iterations`` iterations from the policy in ``start``; returns the folder of the final policy.

    Checkpoints live in ``directory/checkpoints``; if there is one that can be trusted, the run goes on from it, and
    ``on_resume`` is told how many iterations are already done. ``notice`` is told of checkpoints that are refused.

    Raises:
        UserError: training collapsed once more than ``max_rollbacks`` times.
    """
    checkpoints = Checkpoints(directory / "checkpoints", start, config.keep_last)
    checkpoint = checkpoints.latest(notice)
    done, guard = checkpoint.iterations_done, checkpoint.guard
    checkpoints.prune(done, guard)
    on_resume(done)
    run = _Run(
        config,
        checkpoints,
        _start_actor(config, players_config, placement, start),
        Players(players_config, placement, start),
    )
    if done > 0:
        run.go_on_from(checkpoint)
    if done == 0 and config.validation_plan:
        guard = validated(guard, 0, run.validate(0)[0])
    for number in range(done, config.iterations):
        iteration, guard, going_on = run.iterate(number, guard)
        on_iteration(iteration)
        if not going_on:
            raise UserError(_end(iteration, guard, checkpoints.best(guard, number)))
        if iteration.events or (number + 1) % config.save_interval == 0 or number + 1 == config.iterations:
            checkpoints.write(run.save, number + 1, guard)
    if config.iterations == 0:
        raise UserError("runner.max_epochs: nothing was trained; expected at least 1")
    if config.final == "best":
        return checkpoints.best(guard, config.iterations).policy
    return checkpoints.latest(notice).policy


class _Run:
    """The components of a run and what is done with them."""

    def __init__(self, config: LoopConfig, checkpoints: Checkpoints, actor: Any, players: Players) -> None:
        self._config, self._checkpoints, self._actor, self._players = config, checkpoints, actor, players

    def iterate(self, number: int, guard: GuardState) -> tuple[Iteration, GuardState, bool]:
        """One iteration with its guards and, where due, its validation; the last value is False where it is over."""
        config, guards = self._config, self._config.guards
        iteration = _iterate(config, self._players, self._actor, number, learning_rate_scale(guard, guards))
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
        results = self._players.play(plan, NoiseKey(self._config.seed, VALIDATION_STREAM, 0), "eval")
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
        fetch(self._actor.resume.remote(checkpoint.directory), "the actor")
        self._players.load(self._actor.weights.remote())

    def save(self, folder: Path) -> None:
        """Policy and optimiser into the existing ``folder``."""
        fetch(self._actor.save.remote(folder), "the actor's checkpoint")


def _end(iteration: Iteration, guard: GuardState, best: Checkpoint) -> str:
    return (
        f"training collapsed in iteration {iteration.number} ({iteration.events[0]}) after {guard.rollbacks} rollbacks "
        f"(algorithm.max_rollbacks); its best policy, of {best.iterations_done} iterations, is {best.policy}; lower "
        "actor.optim.lr or algorithm.target_kl and train again"
    )


def _start_actor(config: LoopConfig, players: PlayersConfig, placement: Placement, start: Path) -> Any:
    device = placement.actor[0] if placement.actor else None
    actor = (
        ray.remote(ActorWorker)
        .options(**gpu_options(placement, device))
        .remote(
            start,
            players.sampler,
            players.lora,
            config.update,
            config.train_expert_only,
            config.gradient_checkpointing,
            config.num_threads,
            "cpu" if device is None or placement.accelerator == "cpu" else "cuda",
        )
    )
    fetch(actor.start.remote(), "the actor")
    return actor


def _iterate(config: LoopConfig, players: Players, actor: Any, number: int, lr_scale: float) -> Iteration:
    watch = Stopwatch()
    plan = iteration_plan(config, number)
    players.play(plan, NoiseKey(config.seed, TRAIN_STREAM, number), "train")
    seconds = players.seconds()
    watch.lap("time/generate_rollouts")
    parts = players.trajectories(plan, config.rewards, config.max_episode_steps)
    update = actor.update.remote(number, config.max_episode_steps, *parts, lr_factor=lr_scale)
    metrics = fetch(update, "the actor's update", UPDATE_SECONDS)
    watch.lap("time/actor_training")
    players.load(actor.weights.remote())
    watch.lap("time/sync_weights")
    step = sum(watch.seconds.values())
    timing = watch.seconds | {
        "time/step": step,
        **{f"time/env/{name}": value for name, value in seconds.items()},
        "perf/env_steps_per_second": metrics["env/steps"] / step,
    }
    return Iteration(number, metrics, timing)


def iteration_plan(config: LoopConfig, number: int) -> tuple[Episode, ...]:
    """The episodes of iteration ``number``."""
    plan = training_plan(
        config.suites, config.split, config.episodes, config.group_size, config.seed, number, config.init_state_ids
    )
    return tuple(replace(episode, seed=config.scene_seed) for episode in plan)
