"""Learning-rate schedules over RL iterations."""

from __future__ import annotations

import math

from pi0rl.rl.config import OptimConfig


def learning_rate_factor(config: OptimConfig, iteration: int, clamp: bool = True) -> float:
    """Factor on both learning rates in RL iteration ``iteration`` (0, 1, ...).

    With w warm-up iterations, N in total and m = ``min_lr_rate``: ``k / max(1, w)`` for k < w, afterwards with
    ``p = (k - w) / max(1, N - w)``: constant 1; linear ``m + (1 - m)(1 - p)``; cosine
    ``max(0, m + (1 - m)(1 + cos(pi p)) / 2)``.

    Args:
        clamp: stay at m after iteration N. RLinf does not, so that its cosine rises again (``compat="rlinf"``).
    """
    warmup = config.lr_warmup_steps
    if iteration < warmup:
        return iteration / max(1, warmup)
    if config.lr_scheduler == "constant":
        return 1.0
    progress = (iteration - warmup) / max(1, config.total_training_steps - warmup)
    if clamp:
        progress = min(progress, 1.0)
    shape = 1.0 - progress if config.lr_scheduler == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return max(0.0, config.min_lr_rate + (1.0 - config.min_lr_rate) * shape)


def adam_warmup_factor(config: OptimConfig, actor_steps: int) -> float:
    """Further factor on the actor's rate after ``actor_steps`` optimiser steps of the actor: 1/w, 2/w, ..., 1."""
    return min(1.0, (actor_steps + 1) / max(1, config.adam_warmup_steps))
