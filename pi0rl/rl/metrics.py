"""Metrics of an iteration's rollout, named as they are logged."""

from __future__ import annotations

from torch import Tensor

from pi0rl.rl.advantages import Batch
from pi0rl.rl.trajectories import Rollout


def rollout_metrics(rollout: Rollout, batch: Batch) -> dict[str, float]:
    """``env/*``: means over episodes (lengths in environment steps, returns up to the end of the episode);
    ``rollout/*``: over the samples that count."""
    episodes = rollout.trajectories
    returns = [float(episode.rewards.reshape(-1)[: episode.steps].sum()) for episode in episodes]
    lengths = [episode.steps for episode in episodes]
    metrics = {
        "env/success_once": sum(episode.succeeded for episode in episodes) / len(episodes),
        "env/return": sum(returns) / len(episodes),
        "env/episode_len": sum(lengths) / len(episodes),
        "env/num_trajectories": float(len(episodes)),
        "rollout/rewards_mean": sum(returns) / sum(lengths),
        "rollout/samples": float(len(batch)),
    }
    metrics |= _spread("rollout/advantages", batch.advantages[batch.mask])
    if batch.returns is not None:
        metrics |= _spread("rollout/returns", batch.returns[batch.mask])
    return metrics


def _spread(name: str, numbers: Tensor) -> dict[str, float]:
    """Mean, extremes and population standard deviation; nothing of nothing."""
    if numbers.numel() == 0:
        return {}
    return {
        f"{name}_mean": float(numbers.mean()),
        f"{name}_min": float(numbers.min()),
        f"{name}_max": float(numbers.max()),
        f"{name}_std": float(numbers.std(unbiased=False)),
    }
