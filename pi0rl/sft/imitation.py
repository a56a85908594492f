"""Imitation (SFT): flow matching on demonstrations, as openpi trains pi0 (AdamW, warm-up, cosine decay, clipping)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from pi0rl.observation import Observation
from pi0rl.params import SftParams
from pi0rl.policy.model import sample_training_time
from pi0rl.policy.policy import Policy
from pi0rl.sft.demonstrations import Demonstrations


@dataclass(frozen=True)
class ImitationStep:
    """One optimiser step: number (from 1), mean loss of its batch, gradient norm before clipping, learning rate."""

    step: int
    loss: float
    grad_norm: float
    lr: float


def imitate(policy: Policy, demonstrations: Demonstrations, params: SftParams, seed: int) -> Iterator[ImitationStep]:
    """Train all of ``policy`` in place, one yield per optimiser step; deterministic given seed and thread count.

    The caller may stop at any step; the policy then is what it is after that step.
    """
    torch.use_deterministic_algorithms(True)
    actions = action_windows(demonstrations, policy.config.action_horizon)
    targets = torch.from_numpy(policy.processing.targets(actions, demonstrations.state).astype(np.float32))
    generator = np.random.default_rng([seed, 0])
    torch_generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        policy.model.parameters(), lr=params.lr, betas=(0.9, 0.95), weight_decay=params.weight_decay
    )
    policy.train()
    order = iter(())
    for step in range(1, params.steps + 1):
        rows = np.array([index for _, index in zip(range(params.batch_size), order, strict=False)], dtype=np.int64)
        if len(rows) < params.batch_size:  # the rest of an epoch is too small for a batch: shuffle anew
            order = iter(generator.permutation(demonstrations.looks))
            rows = np.array([next(order) for _ in range(params.batch_size)], dtype=np.int64)
        lr = learning_rate(params, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        inputs = policy.processing.inputs(shift_images(demonstrations.observation(rows), params.image_shift, generator))
        target = targets[torch.from_numpy(rows)]
        noise = torch.randn(target.shape, generator=torch_generator)
        time = sample_training_time(len(rows), torch_generator)
        loss = policy.model.flow_matching_loss(inputs, target, noise, time).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), params.clip_grad, error_if_nonfinite=True)
        optimizer.step()
        yield ImitationStep(step, float(loss.detach()), float(norm), lr)


def learning_rate(params: SftParams, step: int) -> float:
    """Linear warm-up to ``lr``, then a cosine down to ``min_lr`` at the last step (steps count from 1)."""
    if step <= params.warmup_steps:
        return params.lr * step / params.warmup_steps
    progress = (step - params.warmup_steps) / max(1, params.steps - params.warmup_steps)
    return params.min_lr + (params.lr - params.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def action_windows(demonstrations: Demonstrations, horizon: int) -> np.ndarray:
    """The actions of the next H steps for every step, float32 [N, H, 7]; an episode's last action is repeated."""
    indices = np.arange(len(demonstrations))
    ends = np.searchsorted(demonstrations.episode, demonstrations.episode, side="right") - 1
    return demonstrations.actions[np.minimum(indices[:, None] + np.arange(horizon), ends[:, None])]


def shift_images(observation: Observation, pixels: int, generator: np.random.Generator) -> Observation:
    """Move every image by up to ``pixels`` in both directions, edges repeated: the cheap part of augmentation."""
    if pixels == 0:
        return observation

    def shift(images: np.ndarray) -> np.ndarray:
        padded = np.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)), mode="edge")
        size = images.shape[1]
        offsets = generator.integers(0, 2 * pixels + 1, size=(len(images), 2))
        moved = [image[y : y + size, x : x + size] for image, (y, x) in zip(padded, offsets, strict=True)]
        return np.stack(moved)

    return Observation(
        shift(observation.base_image), shift(observation.wrist_image), observation.state, observation.prompt
    )
