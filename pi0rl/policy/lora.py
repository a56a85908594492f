"""LoRA on the VLM: W x + B A x, where only A and B are trained, through peft.

Adapters live in training alone. Whatever is written to disk as a policy holds merged weights W + B A under their
ordinary names, so that a checkpoint of a LoRA run is a checkpoint like any other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pi0rl.errors import UserError
from pi0rl.policy.policy import FROZEN_PREFIX, Policy
from pi0rl.policy.precision import ADAPTER

# Every linear layer of attention and MLP, in the image tower and in Gemma, as RLinf has it.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2")
_NAME = "default"


@dataclass(frozen=True)
class LoraConfig:
    """Adapters of ``rank``, added unscaled (RLinf: lora_alpha = lora_rank); ``seed`` decides their initial weights."""

    rank: int
    seed: int


def add_lora(policy: Policy, config: LoraConfig) -> None:
    """Put adapters on the VLM, in place; at first they change nothing, as B starts at zero.

    A starts with N(0, 1 / rank). Adapters are float32 whatever the weights are: a step of their small numbers would be
    lost in bfloat16's digits.
    """
    import peft
    from peft.tuners.tuners_utils import cast_adapter_dtype

    if policy.lora_rank is not None:
        raise UserError(f"policy: has adapters of rank {policy.lora_rank} already, expected none; merge them first")
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.rank,
        lora_dropout=0.0,
        init_lora_weights="gaussian",
        target_modules=list(TARGETS),
    )
    vlm = policy.get_submodule("model." + FROZEN_PREFIX.removesuffix("."))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        peft.inject_adapter_in_model(settings, vlm, _NAME)
    cast_adapter_dtype(vlm, _NAME)
    policy.lora_rank = config.rank


def with_lora(policy: Policy, config: LoraConfig | None) -> Policy:
    """``policy`` itself, with adapters where ``config`` asks for them."""
    if config is not None:
        add_lora(policy, config)
    return policy


@torch.no_grad()
def merged_state(policy: Policy) -> dict[str, Tensor]:
    """The policy's state dict with all adapters merged: ordinary names, every weight in the dtype it had."""
    tensors = {}
    for name, tensor in policy.state_dict().items():
        module, found, leaf = name.partition(".base_layer.")
        if not found:
            if ADAPTER not in name:
                tensors[name] = tensor
        elif leaf == "weight":
            tensors[f"{module}.{leaf}"] = _merged(policy.get_submodule(module), tensor)
        else:
            tensors[f"{module}.{leaf}"] = tensor
    return tensors


def _merged(layer: nn.Module, weight: Tensor) -> Tensor:
    """W + B A in float32, rounded once."""
    delta = layer.get_delta_weight(_NAME)  # pyright: ignore[reportCallIssue]
    return (weight.float() + delta.float()).to(weight.dtype)
