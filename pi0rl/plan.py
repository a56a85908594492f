"""``pi0rl plan``: what memory a training will take per device and component, before anything starts.

The policy's part comes from ``policy.memory``; here it is placed, simulators and stored episodes are added, and
where it does not fit, options are tried that would make it fit.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from pi0rl.cluster.actor_worker import PREFIX_CACHE_BYTES
from pi0rl.cluster.placement import Placement, resolve_placement
from pi0rl.cluster.setup import critic_config, noise_config, sampler_config
from pi0rl.libero.suites import suite_tasks
from pi0rl.params import Params
from pi0rl.policy.config import PI0, PI05, TINY
from pi0rl.policy.memory import MemoryConfig, PolicyMemory, predict
from pi0rl.policy.model import LANGUAGE_MULTIPLE

GIB = 2**30
USUAL_GPU_GIB, USUAL_MAIN_GIB = 80.0, 1000.0
MAIN = "main memory"
# Measured beside the tensors: a process with torch; the CUDA context with its kernels; an env worker, and what it
# keeps of every scene it has drawn with LIBERO's own models (software GL; at most six of them) or with simplified ones.
TORCH_PROCESS, CUDA_CONTEXT, ENV_PROCESS = 0.3 * GIB, 0.6 * GIB, 0.2 * GIB
SCENE = {"reference": 1.6 * GIB, "fast": 0.03 * GIB}
MOST_SCENES = 6
# A SentencePiece tokenizer makes about this many tokens of a word of LIBERO's instructions, and two around them.
TOKENS_PER_WORD = 1.3


@dataclass(frozen=True)
class Line:
    """One use of a device.

    Attributes:
        device: ``GPU 3`` or ``main memory``.
        component: env, rollout, actor, or both (rollout and actor in one process).
        purpose: what for.
        size: bytes.
        in_turn: needed only while this component works; components that share a device work in turn.
    """

    device: str
    component: str
    purpose: str
    size: float
    in_turn: bool = False


@dataclass(frozen=True)
class Plan:
    """Who needs what where; ``capacity`` is in bytes by device, ``memory`` what the policy was predicted to take."""

    lines: tuple[Line, ...]
    capacity: dict[str, float]
    memory: PolicyMemory

    def total(self, device: str) -> float:
        """Bytes at the worst moment."""
        lines = [line for line in self.lines if line.device == device]
        most = max((line.size for line in lines if line.in_turn), default=0.0)
        return sum(line.size for line in lines if not line.in_turn) + most

    @property
    def too_full(self) -> list[str]:
        """Devices where it does not fit."""
        return [device for device, capacity in self.capacity.items() if self.total(device) > capacity]


def make_plan(params: Params, gpus: int, gpu_gib: float, main_gib: float) -> Plan:
    """The plan of ``params`` on a machine with ``gpus`` GPUs of ``gpu_gib``, and ``main_gib`` of main memory.

    Raises:
        UserError: a placement that this machine does not have.
    """
    placement = resolve_placement(params.cluster, (gpus,))
    memory = predict(memory_config(params, placement))
    lines = [*_policy_lines(params, placement, memory), *_main_lines(params)]
    capacity = {_gpu(gpu): gpu_gib * GIB for gpu in sorted({*placement.rollout, *placement.actor})}
    return Plan(tuple(lines), capacity | {MAIN: main_gib * GIB}, memory)


def memory_config(params: Params, placement: Placement) -> MemoryConfig:
    """What decides the policy's memory."""
    model, openpi = params.actor.model, params.openpi
    config = {"tiny": TINY, "pi0": PI0, "pi05": PI05}[model.variant]
    critic = critic_config(params)
    whole_prompt = critic is not None and critic.reads_padding
    looks = params.env.train.total_num_envs / params.rollout.pipeline_stage_num / max(1, len(placement.rollout))
    return MemoryConfig(
        model=config,
        critic=critic,
        exploration=noise_config(params),
        sampler=sampler_config(params),
        precision=model.precision or ("fp32" if model.variant == "tiny" else "bf16"),  # as published
        train_expert_only=openpi.train_expert_only,
        gradient_checkpointing=params.actor.fsdp_config.gradient_checkpointing,
        look_batch=math.ceil(looks),
        micro_batch=params.actor.micro_batch_size,
        language=config.max_token_len if whole_prompt else min(config.max_token_len, _language(params)),
        gpu=bool(placement.actor),
        lora_rank=model.lora_rank if model.is_lora else None,
    )


def _language(params: Params) -> int:
    """Language positions of the longest prompt."""
    words = max(len(task.language.split()) for suite in params.suites for task in suite_tasks(suite))
    return LANGUAGE_MULTIPLE * math.ceil((TOKENS_PER_WORD * words + 2) / LANGUAGE_MULTIPLE)


def _policy_lines(params: Params, placement: Placement, memory: PolicyMemory) -> list[Line]:
    """Where the weights are, and what acting and learning add."""
    lines = []
    rollout, actor = ([_gpu(gpu) for gpu in gpus] or [MAIN] for gpus in (placement.rollout, placement.actor))
    parts = len(placement.seats("actor")) if params.actor.fsdp_config.sharding_strategy == "full_shard" else 1
    for device in dict.fromkeys([*rollout, *actor]):
        sharers = [name for name, devices in (("rollout", rollout), ("actor", actor)) if device in devices]
        owner = "both" if len(sharers) > 1 else sharers[0]  # one process with one copy
        shares = parts if "actor" in sharers else 1
        rest, what = memory.weights * (1 - 1 / shares), "weights" if shares == 1 else f"weights, one of {shares} parts"
        lines.append(Line(device, owner, what, memory.weights - rest))
        if device != MAIN:
            lines.append(Line(device, owner, "CUDA and its kernels", CUDA_CONTEXT))
        if "rollout" in sharers:
            cache = f"a look, of it keys and values {_gib(memory.look_cache)}"
            cache += f"; the other parts of the weights {_gib(rest)}" if rest else ""
            lines.append(Line(device, "rollout", cache, memory.look + rest, in_turn=True))
        elif rest:
            lines.append(Line(device, "actor", "the other parts of the weights, to hand over", rest, in_turn=True))
        if "actor" in sharers:
            batch = f"micro batch of {params.actor.micro_batch_size}, of it keys and values {_gib(memory.update_cache)}"
            kept = _kept_prefixes(params, memory)
            batch += f"; prefixes kept for all epochs {_gib(kept)}" if kept else ""
            moments, offload = memory.optimizer / shares, params.actor.enable_offload and device != MAIN
            batch += f"; AdamW's moments {_gib(moments)}" if offload else ""
            update = max(2 * kept, kept + memory.update) + (moments if offload else 0.0)  # 2: while joined
            lines += [
                Line(device, "actor", "gradients", memory.gradients / shares),
                Line(MAIN if offload else device, "actor", "AdamW's moments", moments),
                Line(device, "actor", batch, update, in_turn=True),
            ]
            if params.actor.ema_decay is not None:
                lines.append(Line(MAIN, "actor", "average of the trained weights", 4.0 * memory.trained))
    return lines


def _kept_prefixes(params: Params, memory: PolicyMemory) -> float:
    """Bytes of a frozen prefix's keys and values that the actor keeps for an update, at most."""
    if not params.openpi.train_expert_only or params.actor.model.is_lora:
        return 0.0
    of_one = memory.update_cache / params.actor.micro_batch_size
    if of_one * _episodes(params) > PREFIX_CACHE_BYTES:  # too much even if every episode ended at once
        return 0.0
    return min(of_one * _episodes(params) * _looks(params), PREFIX_CACHE_BYTES)


def _episodes(params: Params) -> int:
    return params.env.train.total_num_envs * params.algorithm.rollout_epoch


def _looks(params: Params) -> int:
    """Of an episode, at most."""
    return math.ceil(params.env.train.max_episode_steps / params.actor.model.num_action_chunks)


def _main_lines(params: Params) -> list[Line]:
    """What main memory holds whatever the GPUs do."""
    env, model = params.env, params.actor.model
    train = env.train
    tasks = sum(len(suite_tasks(suite)) for suite in params.suites)
    scenes = min(tasks, MOST_SCENES) if env.render_profile == "reference" else tasks
    worker = ENV_PROCESS + SCENE[env.render_profile] * scenes
    looks = _episodes(params) * _looks(params)
    pi0 = {"tiny": TINY, "pi0": PI0, "pi05": PI05}[model.variant]
    chain = 4 * (model.num_steps + 1) * pi0.action_horizon * pi0.action_dim
    stored = looks * (2 * 3 * env.camera_size**2 + chain)
    return [
        Line(MAIN, "env", f"{train.workers} workers with {scenes} scenes each", train.workers * worker),
        Line(MAIN, "rollout", f"pictures and chains of at most {looks} looks", stored),
        Line(MAIN, "actor", "the same, joined for the update", stored),
        Line(MAIN, "rollout", "process", TORCH_PROCESS),
        Line(MAIN, "actor", "process", TORCH_PROCESS),
    ]


def remedies(params: Params, plan: Plan, gpus: int, gpu_gib: float, main_gib: float) -> list[tuple[str, Plan]]:
    """Changes of the params that lower what is too much, each with its plan: one by one, and then all together."""
    tried: dict[str, Any] = {}
    if set(plan.too_full) & {line.device for line in plan.lines if line.component == "actor" and line.in_turn}:
        tried["actor.fsdp_config.gradient_checkpointing"] = True
        model = params.actor.model
        if len(resolve_placement(params.cluster, (gpus,)).actor) > 1 and not (model.is_lora or model.torch_compile):
            tried["actor.fsdp_config.sharding_strategy"] = "full_shard"
        tried["actor.enable_offload"] = True
        tried["actor.micro_batch_size"] = max(1, params.actor.micro_batch_size // 8)
        tried["actor.model.precision"] = "bf16"
        tried["openpi.train_expert_only"] = True
        tried["actor.model.is_lora"] = not params.actor.model.is_lora
    if MAIN in plan.too_full:
        tried["env.render_profile"] = "fast"
        tried["env.train.workers"] = math.ceil(params.env.train.workers / 2)
        tried["algorithm.rollout_epoch"] = max(1, params.algorithm.rollout_epoch // 4)
    changes = {key: value for key, value in tried.items() if _with(params, {key: value}) != params}
    together = {key: value for key, value in changes.items() if (key, value) != ("actor.model.is_lora", True)}
    found = []
    for chosen in [{key: value} for key, value in changes.items()] + ([together] if len(together) > 1 else []):
        other = make_plan(_with(params, chosen), gpus, gpu_gib, main_gib)
        if any(other.total(device) < plan.total(device) for device in plan.too_full):
            found.append((" ".join(f"{key}={str(value).lower()}" for key, value in chosen.items()), other))
    return found


def _with(params: Params, values: dict[str, Any]) -> Params:
    tree = params.model_dump()
    for key, value in values.items():
        *sections, last = key.split(".")
        section = tree
        for name in sections:
            section = section[name]
        section[last] = value
    return Params.model_validate(tree)


def describe(name: str, params: Params, plan: Plan) -> str:
    """The plan as text."""
    memory, variant = plan.memory, params.actor.model.variant
    lines = [
        f"{name}: {variant}, {_count(memory.parameters)} parameters, {_count(memory.trained)} trained, "
        f"weights {_gib(memory.weights)}"
    ]
    for device, capacity in plan.capacity.items():
        total = plan.total(device)
        verdict = "fits" if total <= capacity else f"{_gib(total - capacity)} too much"
        lines += ["", f"{device}: {_gib(total)} of {_gib(capacity)}, {verdict}"]
        for line in plan.lines:
            if line.device == device:
                turn = "  (in turn)" if line.in_turn else ""
                lines.append(f"  {line.component:8} {_gib(line.size):>9}  {line.purpose}{turn}")
    return "\n".join(lines)


def print_plan(name: str, params: Params, gpus: int | None, gpu_gib: float | None, main_gib: float | None) -> int:
    """Print the plan and, where it does not fit, what would; returns 0 if it fits and 1 if not.

    Args:
        gpus, gpu_gib, main_gib: the machine; left out, this one, or where the params name GPUs that it does not have,
            as many of them as they name, with 80 GiB each and 1000 GiB of main memory.
    """
    found = torch.cuda.device_count()
    here = found or not named_gpus(params)
    if gpu_gib is None:
        gpu_gib = torch.cuda.get_device_properties(0).total_memory / GIB if found else USUAL_GPU_GIB
    if main_gib is None:
        main_gib = psutil.virtual_memory().total / GIB if here else USUAL_MAIN_GIB
    machine = (gpus or found or named_gpus(params), gpu_gib, main_gib)
    plan = make_plan(params, *machine)
    print(describe(name, params, plan))
    if not plan.too_full:
        return 0
    print("\nWhat would help (--set KEY=VALUE):")
    for change, other in remedies(params, plan, *machine):
        sizes = ", ".join(f"{device} {_gib(other.total(device))}" for device in plan.too_full)
        print(f"  {change}: {sizes}{'' if other.too_full else ' - fits'}")
    return 1


def named_gpus(params: Params) -> int:
    """As many as the highest number in the placement asks for; one for ``all``."""
    entries = params.cluster.component_placement.values()
    places = [str(value) for value in entries if value != "cpu" and not isinstance(value, dict)]
    return max((int(number) + 1 for place in places for number in re.findall(r"\d+", place)), default=len(places[:1]))


def _gpu(number: int) -> str:
    return f"GPU {number}"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.0f} MiB"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"
