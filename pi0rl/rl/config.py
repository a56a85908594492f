"""Settings of the learning algorithm; key names are RLinf's wherever it has them.

``compat="rlinf"`` turns on what RLinf's embodied actor does instead of what its params say; :func:`effective` holds
the keys it ignores, and the remaining differences are marked with ``compat`` where they happen.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from pi0rl.errors import UserError

Level = Literal["chunk_level", "action_level", "token_level"]


@dataclass(frozen=True)
class RewardConfig:
    """How success becomes reward (:func:`pi0rl.rl.trajectories.shape_rewards`)."""

    reward_coef: float = 1.0
    use_rel_reward: bool = True
    """Emit the change of the reward since the last step, so that success pays once."""
    use_step_penalty: bool = False
    """Subtract 1 at every step (before taking differences)."""
    latch_success: bool = True
    """Rewards after the first success are 0, for the episode is over. Without it (RLinf) losing success again later in
    the same chunk takes the reward back."""


@dataclass(frozen=True)
class GuardConfig:
    """When training counts as collapsed, and what then happens (:mod:`pi0rl.rl.guards`).

    Raises:
        UserError: a value out of range.
    """

    collapse_drop: float | None = 0.2
    """Collapsed: success, averaged over ``collapse_window`` iterations, lies this far below its best; None: never."""
    collapse_window: int = 3
    collapse_kl: float | None = 2.0
    """Collapsed: the approximate KL of a minibatch exceeds this; None: never."""
    max_rollbacks: int = 2
    """How often to go back to the best checkpoint; after that a collapse ends the run."""
    rollback_lr_factor: float = 0.5
    """Factor on all learning rates from a rollback on."""

    def __post_init__(self) -> None:
        _require(
            self.collapse_drop is None or 0.0 < self.collapse_drop < 1.0,
            f"algorithm.collapse_drop={self.collapse_drop}: must be in (0, 1), or null to switch it off",
        )
        _require(
            self.collapse_kl is None or self.collapse_kl > 0.0,
            f"algorithm.collapse_kl={self.collapse_kl}: must be positive, or null to switch it off",
        )
        _require(self.collapse_window >= 1, f"algorithm.collapse_window={self.collapse_window}: must be at least 1")
        _require(self.max_rollbacks >= 0, f"algorithm.max_rollbacks={self.max_rollbacks}: must not be negative")
        _require(
            0.0 < self.rollback_lr_factor <= 1.0,
            f"algorithm.rollback_lr_factor={self.rollback_lr_factor}: must be in (0, 1]",
        )


@dataclass(frozen=True)
class AlgorithmConfig:
    """Advantages, losses and guards.

    Raises:
        UserError: a value out of range or an impossible combination.
    """

    compat: Literal["none", "rlinf"] = "none"

    adv_type: Literal["gae", "grpo"] = "gae"
    loss_type: Literal["actor_critic", "actor"] = "actor_critic"
    reward_type: Literal["chunk_level", "action_level"] = "chunk_level"
    logprob_type: Level = "chunk_level"

    gamma: float = 0.99
    gae_lambda: float = 0.95
    normalize_advantages: bool = True
    group_size: int = 1
    filter_rewards: bool = False
    rewards_lower_bound: float = 0.1
    rewards_upper_bound: float = 0.9

    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    clip_ratio_c: float | None = 3.0
    """Dual clip: the loss of a sample is at most ``clip_ratio_c * |advantage|``; None switches it off."""
    clip_log_ratio_min: float | None = None
    clip_log_ratio_max: float | None = None
    loss_agg_func: Literal["token-mean", "trajectory-mean"] = "token-mean"
    """Whether every sample or every trajectory weighs the same."""
    value_clip: float | None = 0.2
    huber_delta: float = 10.0
    entropy_bonus: float = 0.0
    entropy_type: Level = "token_level"
    """What the entropy bonus counts: numbers, actions (E times as much) or chunks (C E times as much)."""
    kl_beta: float = 0.0
    """Weight of the KL term to the policy that training began from; needs ``Batch.reference``."""
    kl_penalty: Literal["gaussian", "kl", "abs", "mse", "low_var_kl"] = "gaussian"
    """How that KL is had: ``gaussian`` exactly, from mean and std of the two transitions; the others are estimates
    from the sampled log-probs (:func:`pi0rl.rl.losses.kl_estimate`)."""

    update_epoch: int = 4
    target_kl: float | None = 0.15
    """The actor takes no further step in this iteration once a minibatch's approximate KL exceeds it, the critic goes
    on; None: never stop."""
    ratio_tolerance: float | None = 1e-2
    """Largest |log ratio| allowed on the first minibatch, before any step; None: report only."""

    def __post_init__(self) -> None:
        expected_loss = "actor_critic" if self.adv_type == "gae" else "actor"
        _require(
            self.loss_type == expected_loss,
            f"algorithm.loss_type={self.loss_type}: adv_type={self.adv_type} needs {expected_loss}",
        )
        _require(0.0 <= self.gamma <= 1.0, f"algorithm.gamma={self.gamma}: must be in [0, 1]")
        _require(0.0 <= self.gae_lambda <= 1.0, f"algorithm.gae_lambda={self.gae_lambda}: must be in [0, 1]")
        _require(0.0 < self.clip_ratio_low < 1.0, f"algorithm.clip_ratio_low={self.clip_ratio_low}: must be in (0, 1)")
        _require(self.clip_ratio_high > 0.0, f"algorithm.clip_ratio_high={self.clip_ratio_high}: must be positive")
        _require(
            self.clip_ratio_c is None or self.clip_ratio_c > 1.0,
            f"algorithm.clip_ratio_c={self.clip_ratio_c}: must be above 1, or null to switch the dual clip off",
        )
        for name in ("value_clip", "target_kl", "ratio_tolerance", "clip_log_ratio_max"):
            value = getattr(self, name)
            _require(value is None or value > 0.0, f"algorithm.{name}={value}: must be positive, or null for none")
        low = self.clip_log_ratio_min
        _require(low is None or low < 0.0, f"algorithm.clip_log_ratio_min={low}: must be negative, or null for none")
        _require(self.entropy_bonus >= 0.0, f"algorithm.entropy_bonus={self.entropy_bonus}: must not be negative")
        _require(
            self.kl_penalty != "kl" or self.kl_beta == 0.0 or self.compat == "rlinf",
            "algorithm.kl_penalty=kl: the mean of its gradient is 0, so that kl_beta would pull nowhere; use gaussian, "
            "low_var_kl or mse",
        )
        _require(self.huber_delta > 0.0, f"algorithm.huber_delta={self.huber_delta}: must be positive")
        _require(self.kl_beta >= 0.0, f"algorithm.kl_beta={self.kl_beta}: must not be negative")
        _require(self.update_epoch >= 1, f"algorithm.update_epoch={self.update_epoch}: must be at least 1")
        _require(
            self.adv_type == "gae" or self.group_size >= 2,
            f"algorithm.group_size={self.group_size}: adv_type=grpo compares the episodes of a group, so at least 2",
        )
        _require(
            self.rewards_lower_bound <= self.rewards_upper_bound,
            f"algorithm.rewards_lower_bound={self.rewards_lower_bound}: must not be above rewards_upper_bound="
            f"{self.rewards_upper_bound}",
        )
        _require(
            self.reward_type == "chunk_level" or self.logprob_type != "chunk_level",
            "algorithm.reward_type=action_level: gives one advantage per action, so logprob_type must be action_level "
            "or token_level",
        )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning-rate schedule (RLinf: ``actor.optim.*``)."""

    lr: float = 5e-6
    value_lr: float = 1e-4
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.01
    clip_grad: float = 1.0

    lr_scheduler: Literal["constant", "cosine", "linear"] = "constant"
    lr_warmup_steps: int = 0
    """RL iterations of linear warm-up, for both groups."""
    total_training_steps: int | None = None
    """RL iterations until the schedule reaches ``min_lr_rate``; None: all of the run (``runner.max_epochs``)."""
    min_lr_rate: float = 0.0
    adam_warmup_steps: int = 0
    """The actor's first optimiser steps with a linearly rising rate: Adam's first steps are large."""

    critic_warmup_steps: int = 0
    """The first optimiser steps that train the critic only."""
    critic_warmup_iterations: int = 0
    """The first RL iterations that train the critic only."""

    def __post_init__(self) -> None:
        for name in ("lr", "value_lr", "adam_eps", "clip_grad"):
            _require(getattr(self, name) > 0.0, f"actor.optim.{name}={getattr(self, name)}: must be positive")
        for name in ("adam_beta1", "adam_beta2"):
            _require(0.0 <= getattr(self, name) < 1.0, f"actor.optim.{name}={getattr(self, name)}: must be in [0, 1)")
        for name in (
            "weight_decay",
            "min_lr_rate",
            "lr_warmup_steps",
            "adam_warmup_steps",
            "critic_warmup_steps",
            "critic_warmup_iterations",
        ):
            _require(getattr(self, name) >= 0, f"actor.optim.{name}={getattr(self, name)}: must not be negative")


@dataclass(frozen=True)
class UpdateConfig:
    """Everything :func:`pi0rl.rl.update.update` needs besides the data."""

    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    global_batch_size: int = 2048
    """Samples per optimiser step."""
    micro_batch_size: int = 128
    """Samples per forward and backward pass; gradients of a minibatch accumulate over them."""
    seed: int = 42

    def __post_init__(self) -> None:
        _require(self.global_batch_size >= 1, f"actor.global_batch_size={self.global_batch_size}: must be at least 1")
        _require(
            1 <= self.micro_batch_size <= self.global_batch_size,
            f"actor.micro_batch_size={self.micro_batch_size}: must be between 1 and global_batch_size="
            f"{self.global_batch_size}",
        )
        _require(
            self.algorithm.reward_type == "chunk_level" or self.algorithm.adv_type == "grpo",
            "algorithm.reward_type=action_level: GAE would need one value per action, and the critic gives one per "
            "chunk; use chunk_level",
        )


def effective(config: AlgorithmConfig) -> AlgorithmConfig:
    """The settings that are in force: with ``compat="rlinf"``, those keys that RLinf's embodied actor never reads
    for openpi models are set to what it does regardless of them."""
    if config.compat == "none":
        return config
    return replace(
        config,
        clip_ratio_c=None,
        clip_log_ratio_min=None,
        clip_log_ratio_max=None,
        entropy_type="token_level",
        kl_beta=0.0,
        loss_agg_func="trajectory-mean",
        normalize_advantages=True,
        target_kl=None,
    )


def watched_kl(config: AlgorithmConfig) -> str:
    """The metric that ``target_kl`` and ``collapse_kl`` watch in every minibatch.

    It is k2 and not k3, which grows with the ratio itself: among 128 samples a single log ratio of 5.2 makes 1.4 of k3
    and 0.1 of k2, and both agree where the policy moves little.
    """
    return "actor/approx_kl_k3" if config.compat == "rlinf" else "actor/approx_kl_k2"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
