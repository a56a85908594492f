"""Which weights are kept in bfloat16: RLinf's and openpi's mixed precision."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

# Part of the names of LoRA's weights.
ADAPTER = ".lora_"
Precision = Literal["fp32", "bf16"]

# Inside the towers; the small projections and heads around them stay float32 altogether.
_FLOAT32_PARTS = ("patch_embedding", "position_embedding", "input_layernorm", "post_attention_layernorm", "model.norm")
_FLOAT32_PARTS += (ADAPTER,)


def storage_dtype(name: str, precision: Precision) -> torch.dtype:
    """The dtype of the weight ``name`` (openpi's names): ``bf16`` is bfloat16 for both towers without their norms."""
    in_tower = name.removeprefix("model.").startswith("paligemma_with_expert.")
    if precision == "fp32" or not in_tower or any(part in name for part in _FLOAT32_PARTS):
        return torch.float32
    return torch.bfloat16


@torch.no_grad()
def set_precision(model: nn.Module, precision: Precision) -> None:
    """Convert every weight in place to its dtype, one after the other, so that there never are two copies."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(storage_dtype(name, precision))


def materialise(model: nn.Module, precision: Precision) -> None:
    """Give the weights of a model built on the meta device memory in their dtypes; what is in it is arbitrary."""
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        real = torch.empty(parameter.shape, dtype=storage_dtype(name, precision))
        setattr(model.get_submodule(owner), leaf, nn.Parameter(real))
    for name, buffer in list(model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.empty(buffer.shape, dtype=buffer.dtype))
