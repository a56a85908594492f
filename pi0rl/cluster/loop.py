"""The training loop: play a plan, update on it, hand the new weights over, save; killed anywhere, it resumes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from pi0rl.cluster.actor_worker import ActorWorker
from pi0rl.cluster.placement import Placement
from pi0rl.cluster.players import Players, PlayersConfig, Stopwatch, gpu_options
from pi0rl.cluster.playing import UPDATE_SECONDS, fetch
from pi0rl.cluster.rollout_worker import NoiseKey
from pi0rl.errors import UserError
from pi0rl.files import replace_directory
from pi0rl.libero.plan import Episode, training_plan
from pi0rl.rl.config import RewardConfig, UpdateConfig

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
    train_expert_only: bool
    gradient_checkpointing: bool
    num_threads: int
    rewards: RewardConfig
    update: UpdateConfig


@dataclass(frozen=True)
class Iteration:
    """What an iteration reports; ``metrics`` repeat to the bit, ``timing`` does not."""

    number: int
    metrics: dict[str, float]
    timing: dict[str, float]


def train(
    config: LoopConfig,
    players_config: PlayersConfig,
    placement: Placement,
    start: Path,
    directory: Path,
    on_iteration: Callable[[Iteration], None],
    on_resume: Callable[[int], None],
) -> Path:
    """Run ``config.iterations`` iterations from the policy in ``start``; returns the folder of the final policy.

    Checkpoints live in ``directory/checkpoints``; if there is one, the run goes on from it, and ``on_resume`` is told
    how many iterations are already done.
    """
    checkpoint = latest_checkpoint(directory)
    done = 0 if checkpoint is None else checkpoint_iteration(checkpoint)
    on_resume(done)
    policy = start if checkpoint is None else checkpoint / "policy"
    actor = _start_actor(config, players_config, placement, policy)
    if checkpoint is not None:
        fetch(actor.resume.remote(checkpoint), "the actor")
    players = Players(players_config, placement, policy)
    for number in range(done, config.iterations):
        on_iteration(_iterate(config, players, actor, number))
        if (number + 1) % config.save_interval == 0 or number + 1 == config.iterations:
            _save(actor, directory, number + 1)
    final = latest_checkpoint(directory)
    if final is None:
        raise UserError("runner.max_epochs: nothing was trained; expected at least 1")
    return final / "policy"


def _start_actor(config: LoopConfig, players: PlayersConfig, placement: Placement, policy: Path) -> Any:
    device = placement.actor[0] if placement.actor else None
    actor = (
        ray.remote(ActorWorker)
        .options(**gpu_options(placement, device))
        .remote(
            policy,
            players.sampler,
            config.update,
            config.train_expert_only,
            config.gradient_checkpointing,
            config.num_threads,
            "cpu" if device is None else "cuda",
        )
    )
    fetch(actor.start.remote(), "the actor")
    return actor


def _iterate(config: LoopConfig, players: Players, actor: Any, number: int) -> Iteration:
    watch = Stopwatch()
    plan = iteration_plan(config, number)
    players.play(plan, NoiseKey(config.seed, TRAIN_STREAM, number), "train")
    seconds = players.seconds()
    watch.lap("time/generate_rollouts")
    parts = players.trajectories(plan, config.rewards, config.max_episode_steps)
    update = actor.update.remote(number, config.max_episode_steps, *parts)
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


def latest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint with the most iterations, or None; unfinished ones have a temporary name and do not count."""
    found = sorted((directory / "checkpoints").glob("iteration_[0-9][0-9][0-9][0-9][0-9]"))
    return found[-1] if found else None


def checkpoint_iteration(checkpoint: Path) -> int:
    """How many iterations are done in ``checkpoint``."""
    state = json.loads((checkpoint / "state.json").read_text())
    return int(state["iterations_done"])


def _save(actor: Any, directory: Path, iterations_done: int) -> None:
    """Write a checkpoint under a temporary name, rename it, and only then drop the one before."""
    before = latest_checkpoint(directory)
    target = directory / "checkpoints" / f"iteration_{iterations_done:05d}"
    with replace_directory(target) as temporary:
        fetch(actor.save.remote(temporary), "the actor's checkpoint")
        (temporary / "state.json").write_text(json.dumps({"iterations_done": iterations_done}))
    if before is not None:
        shutil.rmtree(before)
