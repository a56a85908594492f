"""The training loop: play a plan, update on it, hand the new weights over, save; killed anywhere, it resumes.

Guards watch it (:mod:`pi0rl.rl.guards`): a collapse sends the run back to its best checkpoint with a smaller step.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pi0rl.cluster.actor_worker import ActorWorker
from pi0rl.cluster.checkpoints import Checkpoint, Checkpoints
from pi0rl.cluster.placement import Placement
from pi0rl.cluster.players import Players, PlayersConfig, Stopwatch, rollout_maker
from pi0rl.cluster.policies import Learner, MakeActor, start_policies
from pi0rl.cluster.reservation import Reservation
from pi0rl.cluster.rollout_worker import NoiseKey
from pi0rl.errors import UserError, WorkerFailed
from pi0rl.libero.plan import Episode, training_plan
from pi0rl.rl.config import GuardConfig, RewardConfig, UpdateConfig
from pi0rl.rl.guards import GuardState, learning_rate_scale, observe, rolled_back, validated

# Without a checkpoint in between; the run can be resumed even then.
MAX_FAILURES = 3
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

    A dead env worker is replaced on the spot. When a process with a policy dies, or none answers any more, everything
    is started again from the last checkpoint.

    Raises:
        UserError: training collapsed once more than ``max_rollbacks`` times.
        WorkerFailed: workers failed ``MAX_FAILURES`` times without reaching another checkpoint.
    """
    _refuse_idle_actors(config.update, len(placement.seats("actor")))
    checkpoints = Checkpoints(directory / "checkpoints", start, config.keep_last)
    make_policies = rollout_maker(players_config, start), _actor_maker(config, players_config, start)
    failures: Counter[int] = Counter()
    while True:
        checkpoint = checkpoints.latest(notice)
        try:
            with Reservation(placement, players_config.workers) as room:
                on_resume(checkpoint.iterations_done)
                policies = start_policies(room, *make_policies)
                run = _Run(config, checkpoints, Learner(policies), Players(players_config, room, policies.rollouts))
                return _go_on(run, config, checkpoints, checkpoint, on_iteration, notice)
        except WorkerFailed as failure:
            failures[checkpoint.iterations_done] += 1
            count = failures[checkpoint.iterations_done]
            if count == MAX_FAILURES:
                raise WorkerFailed(f"{failure} ({count} failures without a checkpoint in between)") from failure
            notice(f"{failure}; starting again after {checkpoint.iterations_done} iterations")


def _go_on(
    run: _Run,
    config: LoopConfig,
    checkpoints: Checkpoints,
    checkpoint: Checkpoint,
    on_iteration: Callable[[Iteration], None],
    notice: Callable[[str], None],
) -> Path:
    """All iterations after ``checkpoint``; returns the folder of the final policy."""
    done, guard = checkpoint.iterations_done, checkpoint.guard
    checkpoints.prune(done, guard)
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


def _refuse_idle_actors(update: UpdateConfig, actors: int) -> None:
    """Raises UserError where a minibatch has fewer micro batches than there are actors to share them."""
    if update.global_batch_size < actors * update.micro_batch_size:
        raise UserError(
            f"actor.micro_batch_size={update.micro_batch_size}: a minibatch of actor.global_batch_size="
            f"{update.global_batch_size} has too few of them for the {actors} actors of cluster.component_placement; "
            f"lower it to {max(1, update.global_batch_size // actors)} or place fewer actors"
        )


class _Run:
    """The components of a run and what is done with them."""

    def __init__(self, config: LoopConfig, checkpoints: Checkpoints, learner: Learner, players: Players) -> None:
        self._config, self._checkpoints, self._learner, self._players = config, checkpoints, learner, players

    def iterate(self, number: int, guard: GuardState) -> tuple[Iteration, GuardState, bool]:
        """One iteration with its guards and, where due, its validation; the last value is False where it is over."""
        config, guards = self._config, self._config.guards
        iteration = _iterate(config, self._players, self._learner, number, learning_rate_scale(guard, guards))
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
        self._learner.resume(checkpoint.directory)

    def save(self, folder: Path) -> None:
        """Policy and optimiser into the existing ``folder``."""
        self._learner.save(folder)


def _end(iteration: Iteration, guard: GuardState, best: Checkpoint) -> str:
    return (
        f"training collapsed in iteration {iteration.number} ({iteration.events[0]}) after {guard.rollbacks} rollbacks "
        f"(algorithm.max_rollbacks); its best policy, of {best.iterations_done} iterations, is {best.policy}; lower "
        "actor.optim.lr or algorithm.target_kl and train again"
    )


def _actor_maker(config: LoopConfig, players: PlayersConfig, start: Path) -> MakeActor:
    """What makes the actor worker of a device."""
    return partial(
        ActorWorker,
        start,
        players.sampler,
        players.lora,
        config.update,
        config.train_expert_only,
        config.gradient_checkpointing,
        config.num_threads,
        compiled=players.compiled,
    )


def _iterate(config: LoopConfig, players: Players, learner: Learner, number: int, lr_scale: float) -> Iteration:
    watch = Stopwatch()
    plan = iteration_plan(config, number)
    players.play(plan, NoiseKey(config.seed, TRAIN_STREAM, number), "train")
    env, acting = players.env_seconds(), players.acting_seconds()
    watch.lap("time/generate_rollouts")
    metrics = learner.update(number, plan, config.rewards, config.max_episode_steps, lr_scale)
    watch.lap("time/actor_training")
    learner.hand_over()
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
    plan = training_plan(
        config.suites, config.split, config.episodes, config.group_size, config.seed, number, config.init_state_ids
    )
    return tuple(replace(episode, seed=config.scene_seed) for episode in plan)
