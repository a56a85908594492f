"""The policy: network, heads and processing, as one thing that is trained, stored and shipped."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from pi0rl.policy.config import Pi0Config
from pi0rl.policy.critic import CriticConfig, NoiseHead, NoiseHeadConfig, ValueHead, pool_prefix
from pi0rl.policy.initialise import draw_repeating, initialise
from pi0rl.policy.model import ModelInputs, Pi0, Prefix
from pi0rl.policy.precision import ADAPTER, materialise
from pi0rl.policy.processing import Processing

FROZEN_PREFIX = "paligemma_with_expert.paligemma."


class Policy(nn.Module):
    """pi0 with what surrounds it. Its weights are arbitrary until loaded, or drawn by ``create_policy``.

    Attributes:
        model: the network.
        value_head, noise_head: None where their configuration is None.
        processing: observations to inputs, and outputs to actions.
        lora_rank: of the adapters that ``lora.add_lora`` put on the VLM; None without.
    """

    def __init__(
        self,
        config: Pi0Config,
        processing: Processing,
        critic: CriticConfig | None = None,
        exploration: NoiseHeadConfig | None = None,
    ):
        super().__init__()
        self.config, self.processing, self.critic_config, self.noise_config = config, processing, critic, exploration
        self.model = Pi0(config)
        self.value_head = _value_head(config, critic)
        self.noise_head = _noise_head(config, exploration)
        self.lora_rank: int | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.action_in_proj.weight.device

    @property
    def exact(self) -> bool:
        """Whether equal shapes give equal bits whoever shares the batch: on the CPU in float32, not compiled."""
        return self.device.type == "cpu" and self.model.expert.dtype == torch.float32 and not self.model.compiled

    def prefix(self, inputs: ModelInputs) -> Prefix:
        """Run the VLM once for B observations, and pool the critic's features where the critic reads the prefix.

        Masked cameras and language padding are not computed, unless the critic pools them too.
        """
        critic = self.critic_config
        reads_padding = critic is not None and critic.reads_padding
        return self.full_prefix(inputs if reads_padding else inputs.without_padding())

    def full_prefix(self, inputs: ModelInputs) -> Prefix:
        """``prefix`` with every token there is in ``inputs``."""
        critic = self.critic_config
        if critic is None or critic.source == "expert":
            return self.model.prefix(inputs)[0]
        prefix, output = self.model.prefix(inputs, with_output=True)
        assert output is not None
        tokens_per_image = self.config.vision.num_patches
        features = pool_prefix(output, prefix.mask, inputs.tokens.shape[1], tokens_per_image, critic)
        if critic.append_state:
            features = torch.cat((features, prefix.state.float()), dim=1)
        return Prefix(prefix.cache, prefix.mask, prefix.state, features)

    def value(self, prefix: Prefix, features: Tensor, action_chunk: int, elapsed: Tensor | None = None) -> Tensor:
        """Value [B] from the prefix, or the expert's features [B, H, width] at one denoising step; 0 without critic.

        Args:
            elapsed: float32 [B], how much of the episode's time is over, in [0, 1]. A critic that asks for it makes NaN
                without: no time limit, no value.
        """
        critic = self.critic_config
        if critic is None or self.value_head is None:
            return torch.zeros(len(features), device=features.device)
        if critic.source == "prefix":
            assert prefix.critic_features is not None, "this prefix was computed without critic features"
            pooled = prefix.critic_features
        else:
            pooled = (features[:, :action_chunk] if critic.chunk_only else features).mean(1)
        if critic.append_time:
            time = pooled.new_full((len(pooled),), math.nan) if elapsed is None else elapsed
            pooled = torch.cat((pooled, time[:, None]), dim=1)
        return self.value_head(pooled.detach() if critic.detach else pooled)

    def named_weights(self) -> dict[str, nn.Parameter]:
        """All parameters under openpi's and RLinf's names (the network's without ``model.``)."""
        return {name.removeprefix("model."): parameter for name, parameter in self.named_parameters()}

    def trains_prefix(self, train_expert_only: bool) -> bool:
        """Whether what the prefix is computed with is trained: the VLM, or adapters on it."""
        return not train_expert_only or self.lora_rank is not None

    def trainable_parameters(self, train_expert_only: bool) -> dict[str, nn.Parameter]:
        """Select what is trained and freeze the rest; returns the selected, named as in ``named_weights``.

        ``train_expert_only``: everything except the VLM (``paligemma_with_expert.paligemma.*``). A VLM with adapters is
        always frozen, and the adapters are always trained.
        """
        frozen = train_expert_only or self.lora_rank is not None
        chosen = {}
        for name, parameter in self.named_weights().items():
            parameter.requires_grad_(ADAPTER in name or not (frozen and name.startswith(FROZEN_PREFIX)))
            if parameter.requires_grad:
                chosen[name] = parameter
        return chosen


def _value_head(config: Pi0Config, critic: CriticConfig | None) -> ValueHead | None:
    if critic is None:
        return None
    width = config.expert.width if critic.source == "expert" else config.text.width
    if critic.append_state:
        width += config.state_dim
    return ValueHead(width + critic.append_time, critic.hidden)


def _reads_alike(own: CriticConfig | None, wanted: CriticConfig | None) -> bool:
    """Whether a value head of the first form is one of the second."""
    if own is None or wanted is None:
        return own == wanted
    return replace(own, detach=wanted.detach, matches_rollout=wanted.matches_rollout) == wanted


def _noise_head(config: Pi0Config, exploration: NoiseHeadConfig | None) -> NoiseHead | None:
    return None if exploration is None else NoiseHead(config.expert.width, config.action_dim, exploration)


def create_policy(
    config: Pi0Config,
    processing: Processing,
    seed: int,
    critic: CriticConfig | None = None,
    exploration: NoiseHeadConfig | None = None,
) -> Policy:
    """A policy with random weights for training from scratch, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = Policy(config, processing, critic, exploration)
        initialise(policy.model)
        if policy.value_head is not None:
            policy.value_head.initialise()
    return policy


def random_policy(config: Pi0Config, processing: Processing, seed: int) -> Policy:
    """A policy without heads and with random weights in mixed bf16, drawn in place: for measuring at full size.

    No weight ever exists in another precision, so the 3.3 B parameters take 6.6 GB. Unlike in ``create_policy`` the
    output projection is random as well: the policy moves.
    """
    with torch.device("meta"):
        policy = Policy(config, processing)
    materialise(policy, "bf16")
    draw = draw_repeating(seed)
    initialise(policy.model, draw)
    with torch.no_grad():
        draw(policy.model.action_out_proj.weight, config.expert.width**-0.5)
    return policy


def with_heads(policy: Policy, critic: CriticConfig | None, exploration: NoiseHeadConfig | None, seed: int) -> Policy:
    """The same network (shared, not copied) with heads for RL: its own where they read the same features, else fresh.

    How a value head is trained (``detach``) and which steps of a rollout it judges (``matches_rollout``) are not its
    form: a critic that RLinf trained is kept.
    """
    processing = replace(policy.processing, absent_camera=critic is not None and critic.reads_padding)
    with torch.device("meta"):
        result = Policy(policy.config, processing, critic, exploration)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        value_head, noise_head = _value_head(policy.config, critic), _noise_head(policy.config, exploration)
        if value_head is not None:
            value_head.initialise()
    result.model = policy.model
    result.value_head = policy.value_head if _reads_alike(policy.critic_config, critic) else value_head
    result.noise_head = policy.noise_head if policy.noise_config == exploration else noise_head
    return result.to(policy.device)
