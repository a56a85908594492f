"""Learning-rate schedules over RL iterations."""

from __future__ import annotations

import math

from pi0rl.rl.config import OptimConfig


def learning_rate_factor(config: OptimConfig, iteration: int, compat: bool = False) -> float:
    """Factor on both learning rates in RL iteration ``iteration`` (0, 1, ...).

    With w warm-up iterations, N in total and m = ``min_lr_rate``: ``(k + 1) / w`` for k < w, afterwards with
    ``p = min(1, (k - w) / max(1, N - w))``: constant 1; linear ``m + (1 - m)(1 - p)``; cosine
    ``max(0, m + (1 - m)(1 + cos(pi p)) / 2)``.

    Args:
        compat: as RLinf does: ``k / w``, so that the first iteration learns nothing, and p beyond 1, so that the cosine
            rises again after iteration N.
    """
    warmup = config.lr_warmup_steps
    if iteration < warmup:
        return (iteration if compat else iteration + 1) / warmup
    if config.lr_scheduler == "constant":
        return 1.0
    if config.total_training_steps is None:
        raise ValueError(f"actor.optim.lr_scheduler={config.lr_scheduler} needs total_training_steps, the run's length")
    progress = (iteration - warmup) / max(1, config.total_training_steps - warmup)
    if not compat:
        progress = min(progress, 1.0)
    shape = 1.0 - progress if config.lr_scheduler == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return max(0.0, config.min_lr_rate + (1.0 - config.min_lr_rate) * shape)


def adam_warmup_factor(config: OptimConfig, actor_steps: int) -> float:
    """Further factor on the actor's rate after ``actor_steps`` optimiser steps of the actor: 1/w, 2/w, ..., 1."""
    return min(1.0, (actor_steps + 1) / max(1, config.adam_warmup_steps))
