"""``pi0rl train PARAMS --dry-run``: one iteration from beginning to end, to see that everything fits together.

As configured: placement, the components and how they share devices, suites, image size, rendering, pipeline stages,
chunks, denoising steps, sampler, heads, precision, algorithm, losses, optimiser, checkpoint. Where the placement names
GPUs that the machine lacks, they are logical: Ray counts them and what is placed there computes on the CPU.

Not as configured, for it proves the wiring, not the speed or the memory (``pi0rl plan`` predicts that): widths and
depths of the network (:func:`shrunk`), which starts with random weights and a word tokenizer, so that no checkpoint is
needed; and the amount of work (:func:`cut`).
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from pi0rl.cluster.iterations import Iteration
from pi0rl.cluster.loop import train
from pi0rl.cluster.placement import Placement, resolve_placement
from pi0rl.cluster.session import gpus_per_node, ray_session
from pi0rl.cluster.setup import critic_config, loop_config, noise_config, players_config
from pi0rl.libero.suites import suite_tasks
from pi0rl.params import Params
from pi0rl.plan import named_gpus
from pi0rl.policy.checkpoints import save_policy
from pi0rl.policy.config import PI0, PI05, TINY, Pi0Config
from pi0rl.policy.policy import Policy, create_policy, with_heads
from pi0rl.policy.precision import set_precision
from pi0rl.policy.processing import Normalisation, tiny_processing
from pi0rl.tracking.metrics import unexplained

CHUNKS = 2
_SHOWN = ("env/num_trajectories", "env/steps", "rollout/samples", "actor/optimizer_steps", "actor/first_ratio_error")


def dry_run(name: str, params: Params) -> None:
    """Run one short iteration of ``params`` in a temporary folder, and print what was run.

    Raises:
        UserError: whatever a real training with these params would be refused for.
    """
    small, started = cut(params, os.cpu_count() or 1), time.monotonic()
    named = named_gpus(params)
    logical = params.cluster.address is None and torch.cuda.device_count() < named
    reports: list[Iteration] = []
    with TemporaryDirectory(prefix="pi0rl-dry-run-") as folder:
        start = Path(folder) / "start"
        policy = start_policy(small)
        save_policy(policy, start)
        with ray_session(small.cluster, small.env.train.workers, named if logical else None):
            placement = resolve_placement(small.cluster, gpus_per_node())
            placement = replace(placement, accelerator="cpu" if logical else "cuda")
            players = players_config(small, small.env.train)
            train(loop_config(small), players, placement, start, Path(folder), reports.append, lambda done: None)
    (report,) = reports
    assert not (missing := unexplained(report.metrics)), missing
    train_params, parameters = small.env.train, sum(parameter.numel() for parameter in policy.parameters())
    print(f"dry run of {name}: one iteration in {time.monotonic() - started:.0f} s")
    print(f"  network: {params.actor.model.variant} shrunk to {parameters / 1e6:.2f} M parameters, random weights")
    print(f"  placement: {_places(placement)}")
    print(
        f"  episodes: {int(report.metrics['env/num_trajectories'])} of {train_params.max_episode_steps} steps in "
        f"{train_params.total_num_envs} slots of {train_params.workers} workers (configured: "
        f"{params.env.train.total_num_envs * params.algorithm.rollout_epoch} of {params.env.train.max_episode_steps} "
        f"in {params.env.train.total_num_envs} of {params.env.train.workers})"
    )
    print("  " + ", ".join(f"{name} {report.metrics[name]:g}" for name in _SHOWN))


def cut(params: Params, cores: int) -> Params:
    """``params`` with little work: an iteration of few episodes, each of two chunks, in two minibatches of two parts.

    At most one env worker per core, one slot per worker and pipeline stage, and as few episodes as make whole groups.
    The filter of GRPO's groups is off: nobody succeeds within two chunks, and then it would leave nothing to train on
    (as it is, GRPO's advantages and gradients are 0, PPO's come from the critic).
    """
    workers = min(params.env.train.workers, cores)
    slots = workers * params.rollout.pipeline_stage_num
    group = params.algorithm.group_size
    rounds = math.lcm(slots, group) // slots
    samples = slots * rounds * CHUNKS
    actors = max(1, named_gpus(params))  # at most
    batch = max(actors, samples // 2)
    changes: dict[str, Any] = {
        "env.train.workers": workers,
        "env.train.total_num_envs": slots,
        "env.train.max_episode_steps": CHUNKS * params.actor.model.num_action_chunks,
        "algorithm.rollout_epoch": rounds,
        "algorithm.filter_rewards": False,
        "actor.global_batch_size": batch,
        "actor.micro_batch_size": max(1, batch // max(2, actors)),
        "runner.max_epochs": 1,
        "runner.save_interval": 1,
        "runner.val_check_interval": 1 if params.runner.val_check_interval > 0 else -1,
        "runner.val_episodes_per_task": 1,
    }
    tree = params.model_dump()
    for key, value in changes.items():
        *sections, last = key.split(".")
        section = tree
        for name in sections:
            section = section[name]
        section[last] = value
    return Params.model_validate(tree)


def shrunk(config: Pi0Config) -> Pi0Config:
    """The same architecture, narrow and shallow: cameras, tokens per image, horizon, padded widths, head counts and
    what pi0.5 does differently stay; the vocabulary is LIBERO's words."""
    return replace(
        config,
        vision=replace(config.vision, width=32, depth=1, mlp_dim=64, num_heads=2),
        text=replace(config.text, width=64, depth=2, mlp_dim=96, head_dim=16),
        expert=replace(config.expert, width=48, depth=2, mlp_dim=96, head_dim=16),
        vocab_size=TINY.vocab_size,
    )


def start_policy(params: Params) -> Policy:
    """Random weights with the heads and in the precision of a real start; full-size checkpoints are published in bf16,
    so that is what ``actor.model.precision: null`` means for them."""
    variant = params.actor.model.variant
    config = TINY if variant == "tiny" else shrunk({"pi0": PI0, "pi05": PI05}[variant])
    prompts = tuple(task.language for suite in params.suites for task in suite_tasks(suite))
    state = Normalisation("mean_std", (0.0,) * 8, (1.0,) * 8)
    action = Normalisation("mean_std", (0.0,) * 7, (0.3,) * 7)
    processing = replace(tiny_processing(config, state, action, prompts), delta_actions=variant == "pi0")
    policy = create_policy(config, processing, params.seed)
    set_precision(policy, params.actor.model.precision or ("fp32" if variant == "tiny" else "bf16"))
    return with_heads(policy, critic_config(params), noise_config(params), params.seed)


def _places(placement: Placement) -> str:
    kind = "logical GPU" if placement.accelerator == "cpu" else "GPU"
    places = {"rollout": placement.rollout, "actor": placement.actor}
    return ", ".join(
        f"{name} on {kind} {' '.join(map(str, gpus))}" if gpus else f"{name} on the CPU"
        for name, gpus in places.items()
    )
