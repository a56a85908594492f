"""A tiny policy with random weights that moves, observations and noise: what the tests of the policy share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from pi0rl.observation import Observation
from pi0rl.policy.config import TINY
from pi0rl.policy.critic import CriticConfig, NoiseHeadConfig
from pi0rl.policy.lora import LoraConfig, add_lora
from pi0rl.policy.policy import Policy, create_policy
from pi0rl.policy.processing import mean_std, tiny_processing
from pi0rl.policy.sampling import SamplerConfig, SamplingNoise, episode_noise, stack_noise
from pi0rl.policy.transformer import AdaptiveRMSNorm

PROMPTS = (
    "pick up the alphabet soup and place it in the basket",
    "pick up the milk and place it in the basket",
    "put both moka pots on the stove",
)
K, H, D = 4, TINY.action_horizon, TINY.action_dim
SDE = SamplerConfig("flow_sde", num_steps=K, action_chunk=H, stochastic="all")


def make_policy(
    critic: CriticConfig | None = None, exploration: NoiseHeadConfig | None = None, pi05: bool = False
) -> Policy:
    rng = np.random.default_rng(0)
    norms = mean_std(rng.normal(size=(50, 8))), mean_std(rng.normal(size=(50, 7)))
    config = replace(TINY, pi05=pi05)
    policy = create_policy(config, tiny_processing(config, *norms, PROMPTS), 0, critic, exploration)
    # Fresh policies predict no velocity at all; these tests need one that depends on what it sees.
    generator = torch.Generator().manual_seed(1)
    torch.nn.init.normal_(policy.model.action_out_proj.weight, std=0.1, generator=generator)
    for module in policy.modules():
        if isinstance(module, AdaptiveRMSNorm):  # pi0.5 starts with closed gates: its expert would see nothing
            torch.nn.init.normal_(module.dense.weight, std=0.1, generator=generator)
    return policy


def with_random_adapters(policy: Policy, rank: int = 4) -> Policy:
    """``policy`` itself with adapters that do something: fresh ones change nothing."""
    add_lora(policy, LoraConfig(rank, seed=0))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in policy.named_weights().items():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return policy


PREFIX_CRITIC = CriticConfig("prefix", (32, 16), pooling="mean_valid", append_state=True)


def observe(rows: int, seed: int = 0) -> Observation:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (2, rows, 64, 64, 3), dtype=np.uint8)
    state = rng.normal(size=(rows, 8)).astype(np.float32)
    return Observation(images[0], images[1], state, tuple(PROMPTS[i % len(PROMPTS)] for i in range(rows)))


def pick(observation: Observation, rows: np.ndarray) -> Observation:
    return Observation(
        observation.base_image[rows],
        observation.wrist_image[rows],
        observation.state[rows],
        tuple(observation.prompt[i] for i in rows),
    )


def noise_for(episodes: np.ndarray | range) -> SamplingNoise:
    return stack_noise([episode_noise(7, 0, 3, int(episode), 1, (K + 1, H, D)) for episode in episodes])
