"""Metrics of an iteration's rollout, named as they are logged."""

from __future__ import annotations

from torch import Tensor

from pi0rl.rl.advantages import Batch
from pi0rl.rl.trajectories import Rollout

# What RLinf calls the same numbers (its logs put ``train/`` before actor and critic). Four differ in more than name:
# its total_loss is divided by the number of micro batches per step, its clip_fraction at token level by chunks instead
# of tokens, its critic/value_clip_ratio is rounding noise where ours is the fraction of clipped values, and its
# episode_len is the step limit, to which it plays on.
RLINF_NAMES = {
    "actor/loss": "actor/total_loss",
    "actor/policy_loss": "actor/policy_loss",
    "actor/policy_loss_abs": "actor/policy_loss_abs",
    "actor/ratio": "actor/ratio",
    "actor/ratio_abs": "actor/ratio_abs",
    "actor/clipped_ratio": "actor/clipped_ratio",
    "actor/dual_clipped_ratio": "actor/dual_cliped_ratio",
    "actor/approx_kl": "actor/approx_kl",
    "actor/pg_clipfrac": "actor/clip_fraction",
    "actor/entropy": "actor/entropy_loss",
    "actor/grad_norm": "actor/grad_norm",
    "actor/lr": "actor/lr",
    "actor/value_loss": "critic/value_loss",
    "actor/value_clip_ratio": "critic/value_clip_ratio",
    "critic/lr": "critic/lr",
    "critic/explained_variance": "critic/explained_variance",
    "rollout/rewards_mean": "rollout/rewards",
    **{
        f"rollout/{what}_{how}": f"rollout/{what}_{how}"
        for what in ("advantages", "returns")
        for how in ("mean", "min", "max")
    },
    **{f"env/{what}": f"env/{what}" for what in ("success_once", "return", "episode_len", "num_trajectories")},
}


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
        "env/steps": float(sum(episode.simulated for episode in episodes)),
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
