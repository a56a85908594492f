"""Initial weights for training from scratch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pi0rl.policy.model import Pi0
from pi0rl.policy.transformer import AdaptiveRMSNorm, Gemma, RMSNorm
from pi0rl.policy.vision import VisionTower

Draw = Callable[[Tensor, float], None]
"""Fills a tensor with normal numbers of a standard deviation."""


def draw_each(weight: Tensor, std: float) -> None:
    """Every number on its own, from torch's current generator."""
    nn.init.normal_(weight, std=std)


def draw_repeating(seed: int) -> Draw:
    """The same few million numbers over and over: ten times faster, for measuring at full size."""
    # A prime length, so that rows of a matrix do not repeat one another.
    block = torch.randn(4_194_301, generator=torch.Generator().manual_seed(seed))

    def draw(weight: Tensor, std: float) -> None:
        scaled = (block * std).to(weight.dtype)
        for part in weight.flatten().split(len(block)):
            part.copy_(scaled[: len(part)])

    return draw


@torch.no_grad()
def initialise(model: Pi0, draw: Draw = draw_each) -> None:
    """Initial weights, drawn with ``draw``; checkpoints overwrite all of it.

    Linear and patch weights N(0, 1 / fan_in), so activations keep unit scale at any width (the references' N(0, 0.02)
    is made for widths of thousands); projections that write into a residual stream are divided by sqrt(2 * depth), so
    the stream does not grow with depth. Word and position embeddings N(0, 1 / width): words are multiplied by
    sqrt(width) afterwards. Norms start neutral; adaptive norms start with zero gates (openpi's JAX model: every block
    an identity). The output projection starts at zero: the first loss is that of predicting no velocity.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            draw(module.weight, 1 / math.sqrt(module.weight[0].numel()))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            draw(module.weight, 1 / math.sqrt(module.embedding_dim))
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, RMSNorm):
            nn.init.zeros_(module.weight)
    for module in model.modules():
        if isinstance(module, AdaptiveRMSNorm):
            nn.init.zeros_(module.dense.weight)
        elif isinstance(module, Gemma | VisionTower):
            _scale_residual_writers(module)
    nn.init.zeros_(model.action_out_proj.weight)


def _scale_residual_writers(stack: Gemma | VisionTower) -> None:
    names = ("o_proj", "out_proj", "down_proj", "fc2")
    writers = [module for name, module in stack.named_modules() if name.endswith(names)]
    for writer in writers:
        assert isinstance(writer, nn.Linear)
        writer.weight.div_(math.sqrt(len(writers)))  # two per layer
