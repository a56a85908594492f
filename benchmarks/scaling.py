"""What an iteration costs on 8, 64 and 256 GPUs, from measured constants: control steps, bytes, FLOPs, cores.

    python -m benchmarks.cluster --model

The workload grows with the GPUs: eight slots per GPU, as RLinf's LIBERO configs have on eight. FLOPs are counted on the
real code with tensors that have shapes but no data, bytes follow from what is sent, and the rate of simulation is what
benchmarks.cluster measured. What a GPU makes of a FLOP was not measured here, so no time is given for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pi0rl.cluster.placement import resolve_placement
from pi0rl.params import Params, load_params
from pi0rl.plan import memory_config
from pi0rl.policy import memory
from pi0rl.policy.precision import materialise

PARAMS = Path(__file__).parents[1] / "params" / "libero_spatial_ppo_openpi.yaml"
SIZES = (8, 64, 256)
SLOTS_PER_GPU, GPUS_PER_NODE = 8, 8
# Simulation should not take longer than this; it decides how many cores are needed.
ROLLOUT_SECONDS = 600.0


@dataclass(frozen=True)
class Constants:
    """Per look: FLOPs of acting and of one epoch's update, bytes of its pictures and chain. Bytes of what is trained.
    Control steps per second of one env worker."""

    acting_flops: float
    update_flops: float
    look_bytes: float
    trained_bytes: float
    steps_per_second: float


def scaling_table(steps_per_second: float) -> str:
    """The model as Markdown, for env workers of that speed."""
    params = load_params(PARAMS)
    constants = measured(params, steps_per_second)
    lines = [
        f"Per look: {constants.acting_flops / 1e12:.2f} TFLOP to act, {constants.update_flops / 1e12:.2f} TFLOP per "
        f"epoch of the update, {constants.look_bytes / 1e6:.2f} MB recorded. Trained weights: "
        f"{constants.trained_bytes / 1e9:.2f} GB. One env worker: {constants.steps_per_second:.0f} control steps/s "
        "(fast profile, 64 px).",
        "",
        "| per iteration | " + " | ".join(f"{gpus} GPUs" for gpus in SIZES) + " |",
        "|---|" + "---|" * len(SIZES),
    ]
    columns = [_column(params, constants, gpus) for gpus in SIZES]
    lines += [f"| {name} | " + " | ".join(column[name] for column in columns) + " |" for name in columns[0]]
    return "\n".join(lines)


def measured(params: Params, steps_per_second: float) -> Constants:
    """The constants of ``params``."""
    config = memory_config(params, resolve_placement(params.cluster, (1,)))
    with FakeTensorMode():
        policy = memory._policy(config)
        materialise(policy, config.precision)
        trained = list(policy.trainable_parameters(config.train_expert_only).values())
        with FlopCounterMode(display=False) as acting:
            memory._look(policy, config)
        with FlopCounterMode(display=False) as updating:
            memory._update(policy, trained, config)
    model, chain = params.actor.model, config.model.action_horizon * config.model.action_dim
    return Constants(
        acting_flops=acting.get_total_flops() / config.look_batch,
        update_flops=updating.get_total_flops() / config.micro_batch,
        look_bytes=2 * 3 * params.env.camera_size**2 + 4 * (model.num_steps + 1) * chain,
        trained_bytes=sum(parameter.nbytes for parameter in trained),
        steps_per_second=steps_per_second,
    )


def _column(params: Params, constants: Constants, gpus: int) -> dict[str, str]:
    episodes = SLOTS_PER_GPU * gpus * params.algorithm.rollout_epoch
    steps = episodes * params.env.train.max_episode_steps
    looks = steps / params.actor.model.num_action_chunks
    epochs, nodes = params.algorithm.update_epoch, math.ceil(gpus / GPUS_PER_NODE)
    updates = epochs * max(1, round(looks / (params.actor.global_batch_size * gpus / GPUS_PER_NODE)))
    reduced = 2 * (gpus - 1) / gpus * constants.trained_bytes
    flops = looks * (constants.acting_flops + epochs * constants.update_flops)
    return {
        "episodes": f"{episodes:,}",
        "control steps, at most": f"{steps / 1e6:.2f} M",
        "looks": f"{looks:,.0f}",
        "acting": f"{looks * constants.acting_flops / 1e15:,.0f} PFLOP",
        "update": f"{epochs * looks * constants.update_flops / 1e15:,.0f} PFLOP",
        "both, per GPU": f"{flops / gpus / 1e15:,.1f} PFLOP",
        f"cores to simulate in {ROLLOUT_SECONDS / 60:.0f} min": (
            f"{math.ceil(steps / constants.steps_per_second / ROLLOUT_SECONDS):,}"
        ),
        "recorded": f"{looks * constants.look_bytes / 1e9:,.1f} GB",
        "of it sent between nodes": f"{(nodes - 1) * looks * constants.look_bytes / 1e9:,.0f} GB",
        "optimiser steps": f"{updates:,}",
        "gradients sent per GPU": f"{updates * reduced / 1e9:,.0f} GB",
        "weights handed over, shared": "0",
        "weights handed over, separate, per rollout GPU": f"{constants.trained_bytes / 1e9:.2f} GB",
    }
