"""Advantages: GAE and GRPO on padded time-major arrays, and the batch of samples that the update trains on.

Arrays are [T, B, ...]: T chunks, B episodes. ``dones`` has T + 1 entries, ``dones[t + 1]`` belongs to chunk t; so
have ``values``, where entry T is what follows the last chunk.
Sources: Schulman et al. 2015 (GAE), Shao et al. 2024 (GRPO); epsilons, masks and the filter as in RLinf.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pi0rl.rl.config import AlgorithmConfig, effective
from pi0rl.rl.trajectories import Rollout


@dataclass(frozen=True)
class Advantages:
    """Results over [T, B, L], L = 1 for ``reward_type="chunk_level"`` and C for ``"action_level"``.

    Attributes:
        advantages: float32.
        returns: float32, the critic's targets; None for GRPO.
        mask: bool, which entries count.
        valid_steps: int64, environment steps of the entry's episode up to its end.
    """

    advantages: Tensor
    returns: Tensor | None
    mask: Tensor
    valid_steps: Tensor


@dataclass(frozen=True)
class Reference:
    """What another policy makes of the same N samples, for the KL term to it; all float32.

    Attributes:
        log_probs: [N, S, C, E], as in :class:`Batch`.
        mean, std: [N, S', C, E], its transitions at the stochastic denoising steps.
    """

    log_probs: Tensor
    mean: Tensor
    std: Tensor

    def rows(self, indices: Tensor) -> Reference:
        """The given samples."""
        return Reference(self.log_probs[indices], self.mean[indices], self.std[indices])


@dataclass(frozen=True)
class Batch:
    """N samples ready for the update; L is 1 or C as in :class:`Advantages`.

    Attributes:
        samples: int64 [N], their numbers in the rollout, handed to ``evaluate``.
        log_probs: float32 [N, S, C, E] of the behaviour policy.
        advantages: float32 [N, L].
        mask: bool [N, L].
        values: float32 [N, L] of the behaviour policy; None without critic.
        returns: float32 [N, L]; None without critic.
        weights: float32 [N, L], a sample's weight in the loss (``loss_agg_func="trajectory-mean"``); None: equal.
        reference: the policy that training began from, for the KL term; None without it.
    """

    samples: Tensor
    log_probs: Tensor
    advantages: Tensor
    mask: Tensor
    values: Tensor | None = None
    returns: Tensor | None = None
    weights: Tensor | None = None
    reference: Reference | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def rows(self, indices: Tensor) -> Batch:
        """The given samples."""

        def pick(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[indices]

        return Batch(
            samples=self.samples[indices],
            log_probs=self.log_probs[indices],
            advantages=self.advantages[indices],
            mask=self.mask[indices],
            values=pick(self.values),
            returns=pick(self.returns),
            weights=pick(self.weights),
            reference=None if self.reference is None else self.reference.rows(indices),
        )


def gae(rewards: Tensor, values: Tensor, dones: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, unnormalised.

    ``delta_t = r_t + gamma V_{t+1} (1 - d_{t+1}) - V_t``, ``A_t = delta_t + gamma lambda (1 - d_{t+1}) A_{t+1}``,
    returns ``A_t + V_t``. A time limit ends the episode like success does: nothing is bootstrapped.

    Args:
        rewards: float32 [T, B].
        values: float32 [T+1, B].
        dones: bool [T+1, B].
    """
    alive = 1.0 - dones[1:].float()
    deltas = rewards + gamma * values[1:] * alive - values[:-1]
    advantages = torch.empty_like(deltas)
    following = torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        following = deltas[t] + gamma * gae_lambda * alive[t] * following
        advantages[t] = following
    return advantages, advantages + values[:-1]


def episode_scores(rewards: Tensor, dones: Tensor) -> Tensor:
    """float32 [B]: rewards [T, B] summed up to the first done entry (``S <- S (1 - d_{t+1}) + r_t``, backwards)."""
    score = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        score = score * (1.0 - dones[t + 1].float()) + rewards[t]
    return score


def group_advantages(scores: Tensor, groups: Tensor) -> Tensor:
    """GRPO: ``(S - mean_g) / (std_g + 1e-6)`` with the unbiased std of the episode's group.

    Args:
        scores: float32 [B].
        groups: int64 [B], which group each episode belongs to; a group of one gets 0.
    """
    advantages = torch.zeros_like(scores)
    for group in groups.unique():
        members = groups == group
        if int(members.sum()) > 1:
            inside = scores[members]
            advantages[members] = (inside - inside.mean()) / (inside.std() + 1e-6)
    return advantages


def kept_groups(returns: Tensor, groups: Tensor, lower: float, upper: float) -> Tensor:
    """bool [B]: episodes whose group has a mean return within [lower, upper]; the others teach nothing.

    Args:
        returns: float32 [B].
        groups: int64 [B].
    """
    keep = torch.zeros_like(groups, dtype=torch.bool)
    for group in groups.unique():
        members = groups == group
        keep[members] = lower <= float(returns[members].mean()) <= upper
    return keep


def normalise(x: Tensor, mask: Tensor) -> Tensor:
    """``(x - mean) / (std + 1e-5)``, mean and unbiased std over the masked-in entries, applied to all of them."""
    inside = x[mask]
    if inside.numel() == 0:
        return x
    spread = inside.std() if inside.numel() > 1 else torch.zeros_like(inside[0])
    return (x - inside.mean()) / (spread + 1e-5)


def valid_mask(dones: Tensor) -> Tensor:
    """bool [T, B, C]: steps no earlier step of which was done, given dones [T+1, B, C].

    The step that reaches success is valid. Of the initial entry only the last column counts.
    """
    entries, episodes, chunk = dones.shape
    flat = dones.transpose(0, 1).reshape(episodes, entries * chunk)[:, chunk - 1 : -1]
    alive = flat.long().cumsum(dim=1) == 0
    return alive.reshape(episodes, entries - 1, chunk).transpose(0, 1)


def compute_advantages(
    rewards: Tensor,
    dones: Tensor,
    values: Tensor,
    groups: Tensor,
    config: AlgorithmConfig,
    ignore_terminations: bool = False,
) -> Advantages:
    """Masks, filter and advantages of a padded rollout.

    Args:
        rewards: float32 [T, B, C].
        dones: bool [T+1, B, C].
        values: float32 [T+1, B, 1] (chunk level) or [T+1, B, C] (action level).
        groups: int64 [B].
        ignore_terminations: episodes go on after success (RLinf's key): every step counts.
    """
    config = effective(config)
    steps_mask = torch.ones_like(dones[1:]) if ignore_terminations else valid_mask(dones)
    valid_steps = steps_mask.sum(dim=(0, 2))
    chunk_level = config.reward_type == "chunk_level"
    mask = steps_mask.any(dim=2, keepdim=True) if chunk_level else steps_mask
    if config.filter_rewards:
        totals = (rewards * mask).sum(dim=(0, 2))
        keep = kept_groups(totals, groups, config.rewards_lower_bound, config.rewards_upper_bound)
        mask = mask & keep[None, :, None]
    if chunk_level:
        flat_rewards, flat_dones = rewards.sum(dim=2), dones.any(dim=2)
    else:
        flat_rewards, flat_dones = _flatten_steps(rewards), _flatten_steps(dones)[rewards.shape[2] - 1 :]
    if config.adv_type == "grpo":
        scores = group_advantages(episode_scores(flat_rewards, flat_dones), groups)
        advantages, returns = scores[None, :, None] * mask, None
    else:
        flat_values = values[..., 0] if chunk_level else _flatten_steps(values)[: len(flat_rewards) + 1]
        flat_advantages, flat_returns = gae(flat_rewards, flat_values, flat_dones, config.gamma, config.gae_lambda)
        advantages = _unflatten_steps(flat_advantages, mask.shape[2])
        returns = _unflatten_steps(flat_returns, mask.shape[2])
        if config.normalize_advantages:
            advantages = normalise(advantages, mask)
    return Advantages(advantages, returns, mask, valid_steps[None, :, None].expand_as(mask))


def make_batch(rollout: Rollout, config: AlgorithmConfig, max_episode_steps: int) -> Batch:
    """The samples of an iteration with their advantages.

    Samples that do not count (filtered groups, chunks after the end) are left out; ``compat="rlinf"`` keeps them, so
    that minibatches are composed as there.
    """
    result = compute_advantages(rollout.rewards, rollout.dones, rollout.values, rollout.groups, config)
    real, mask = rollout.real, result.mask[rollout.real]
    counted = torch.ones(len(mask), dtype=torch.bool) if config.compat == "rlinf" else mask.any(dim=1)
    weights = None
    if effective(config).loss_agg_func == "trajectory-mean":
        # Mean chunks per episode in the place of RLinf's horizon, so that leaving padding out keeps the scale.
        chunk, episodes = rollout.rewards.shape[2], len(rollout.trajectories)
        mean_steps = max_episode_steps if config.compat == "rlinf" else len(mask) * chunk / episodes
        weights = mean_steps / result.valid_steps[real]
    values = None if result.returns is None else rollout.values[:-1][real]
    returns = None if result.returns is None else result.returns[real]
    everything = Batch(
        samples=torch.arange(len(mask)),
        log_probs=rollout.log_probs(),
        advantages=result.advantages[real],
        mask=mask,
        values=values,
        returns=returns,
        weights=weights,
    )
    return everything.rows(counted.nonzero()[:, 0])


def _flatten_steps(x: Tensor) -> Tensor:
    """[T, B, C] -> [T*C, B]: one time axis of environment steps."""
    return x.transpose(1, 2).reshape(-1, x.shape[1])


def _unflatten_steps(x: Tensor, chunk: int) -> Tensor:
    """[T*C, B] -> [T, B, C]."""
    return x.reshape(-1, chunk, x.shape[1]).transpose(1, 2)
