"""Gradient checkpointing: a layer's activations are computed again in the backward pass instead of being kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recomputed(layer: nn.Module, *arguments: Any) -> Any:
    """``layer(*arguments)``; where gradients are wanted, only the arguments stay in memory."""
    if not torch.is_grad_enabled():
        return layer(*arguments)
    return checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False)  # nothing random inside
