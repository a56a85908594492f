"""Initial weights for training from scratch."""

from __future__ import annotations

import math

import torch
from torch import nn

from pi0rl.policy.model import Pi0
from pi0rl.policy.transformer import AdaptiveRMSNorm, Gemma
from pi0rl.policy.vision import VisionTower


@torch.no_grad()
def initialise(model: Pi0) -> None:
    """Draw every weight from torch's current generator; checkpoints overwrite all of it.

    Linear and patch weights N(0, 1 / fan_in), so activations keep unit scale at any width (the references' N(0, 0.02)
    is made for widths of thousands); projections that write into a residual stream are divided by sqrt(2 * depth), so
    the stream does not grow with depth. Word and position embeddings N(0, 1 / width): words are multiplied by
    sqrt(width) afterwards. Norms start neutral; adaptive norms start with zero gates (openpi's JAX model: every block
    an identity). The output projection starts at zero: the first loss is that of predicting no velocity.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.weight[0].numel()))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.embedding_dim))
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
