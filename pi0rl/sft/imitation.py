"""Imitation (SFT): flow matching on demonstrations, as openpi trains pi0 (AdamW, warm-up, cosine decay, clipping)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pi0rl.errors import UserError
from pi0rl.observation import Observation
from pi0rl.params import SftParams
from pi0rl.policy.average import MovingAverage, put
from pi0rl.policy.model import ModelInputs, sample_training_time
from pi0rl.policy.policy import Policy
from pi0rl.rl.update import Alone, Team
from pi0rl.sft.augmentation import augment
from pi0rl.sft.demonstrations import Demonstrations
from pi0rl.sft.recording import BURST_PERIOD, BURST_STEPS

VALIDATION_LOOKS = 256


@dataclass(frozen=True)
class ImitationStep:
    """One optimiser step: number (from 1), mean loss of its batch, gradient norm before clipping, learning rate."""

    step: int
    loss: float
    grad_norm: float
    lr: float


def imitate(policy: Policy, demonstrations: Demonstrations, params: SftParams, seed: int) -> Iterator[ImitationStep]:
    """Train ``policy`` in place, one yield per optimiser step; deterministic given seed and thread count.

    The caller may stop at any step; the policy then is what it is after that step.
    """
    training = Imitation(policy, demonstrations, params, seed)
    while training.done < params.steps:
        yield training.step()


class Imitation:
    """Training of a policy in place, as far as it has come.

    Args:
        policy: with the weights to train asking for a gradient; on its device.
        demonstrations: what to imitate.
        params: how.
        seed: decides batches, noise, times and augmentation.
        team: who shares every batch; all have to be given the same, and all take the same steps.

    Attributes:
        done: optimiser steps so far.
    """

    def __init__(
        self,
        policy: Policy,
        demonstrations: Demonstrations,
        params: SftParams,
        seed: int,
        team: Team | None = None,
    ):
        torch.use_deterministic_algorithms(True)
        self.done = 0
        self._team = team or Alone()
        self._policy, self._demonstrations, self._params = policy, demonstrations, params
        self._targets = network_targets(policy, demonstrations)
        self._looks = learnable_looks(demonstrations, policy.config.action_horizon)
        self._generator = np.random.default_rng([seed, 0])
        self._torch_generator = torch.Generator().manual_seed(seed)
        self._augmenting = torch.Generator().manual_seed(seed + 1)
        self._trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._trained, lr=params.lr, betas=(0.9, 0.95), weight_decay=params.weight_decay
        )
        self._average = None
        if params.ema_decay is not None:
            self._average = MovingAverage(self._trained, params.ema_decay)
        self._order, self._taken = np.empty(0, np.int64), 0
        policy.train()

    def step(self) -> ImitationStep:
        """One optimiser step."""
        params = self._params
        rows = self._next_rows()
        lr = learning_rate(params, self.done + 1)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        observation = shift_images(self._demonstrations.observation(rows), params.image_shift, self._generator)
        inputs = self._policy.processing.inputs(observation).to(self._policy.device)
        if params.augmentation == "openpi":
            inputs = replace(inputs, images=augment(inputs.images, self._augmenting))
        target = self._targets[torch.from_numpy(rows)]
        noise = torch.randn(target.shape, generator=self._torch_generator)
        time = sample_training_time(len(rows), self._torch_generator)
        self._optimizer.zero_grad(set_to_none=True)
        losses, team = [], self._team
        for part in torch.arange(len(rows)).chunk(params.gradient_accumulation * team.size)[team.rank :: team.size]:
            of_part = inputs if len(part) == len(rows) else inputs.rows(part.to(self._policy.device))
            mean = self._loss(of_part, target[part], noise[part], time[part]) * (len(part) / len(rows))
            mean.backward()
            losses.append(float(mean.detach()))
        team.sum_gradients(self._trained)
        loss = sum(team.gather(losses))
        norm = torch.nn.utils.clip_grad_norm_(self._trained, params.clip_grad, error_if_nonfinite=True)
        self._optimizer.step()
        if self._average is not None:
            self._average.follow(self._trained)
        self.done += 1
        return ImitationStep(self.done, loss, float(norm), lr)

    def averaged(self) -> AbstractContextManager[None]:
        """Within it the policy has the moving average of its weights, where one is kept."""
        return nullcontext() if self._average is None else self._average.in_place_of(self._trained)

    @torch.no_grad()
    def validation_loss(self, held_out: Demonstrations) -> float:
        """Mean loss on looks spread evenly over other demonstrations; noise and times are the same on every call."""
        params, generator = self._params, torch.Generator().manual_seed(0)
        targets = network_targets(self._policy, held_out)
        looks = learnable_looks(held_out, self._policy.config.action_horizon)
        chosen = np.linspace(0, len(looks) - 1, min(VALIDATION_LOOKS, len(looks))).astype(int)
        total = 0.0
        for rows in np.array_split(looks[chosen], -(-len(chosen) // params.batch_size)):
            inputs = self._policy.processing.inputs(held_out.observation(rows)).to(self._policy.device)
            target = targets[torch.from_numpy(rows)]
            noise = torch.randn(target.shape, generator=generator)
            time = sample_training_time(len(rows), generator)
            total += float(self._loss(inputs, target, noise, time)) * len(rows)
        return total / len(chosen)

    def state(self) -> dict[str, Any]:
        """Everything needed to go on to the same bytes."""
        return {
            "done": self.done,
            "weights": [weight.detach() for weight in self._trained],
            "average": None if self._average is None else self._average.values,
            "optimizer": self._optimizer.state_dict(),
            "order": torch.from_numpy(self._order),
            "taken": self._taken,
            "generator": self._generator.bit_generator.state,
            "torch_generators": [self._torch_generator.get_state(), self._augmenting.get_state()],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state` of the same policy, demonstrations and params."""
        self.done, self._taken, self._order = state["done"], state["taken"], state["order"].numpy()
        put(self._trained, state["weights"])
        if self._average is not None:
            put(self._average.values, state["average"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._generator.bit_generator.state = state["generator"]
        for generator, saved in zip((self._torch_generator, self._augmenting), state["torch_generators"], strict=True):
            generator.set_state(saved)

    def _next_rows(self) -> np.ndarray:
        """The next batch's looks; the rest of an epoch that is too small for one is left out."""
        size = self._params.batch_size
        if self._taken + size > len(self._order):
            self._order, self._taken = self._generator.permutation(self._looks), 0
        self._taken += size
        return self._order[self._taken - size : self._taken]

    def _loss(self, inputs: ModelInputs, target: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        device = self._policy.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self._params.mixed_precision):
            losses = self._policy.model.flow_matching_loss(inputs, target.to(device), noise.to(device), time.to(device))
        return losses.mean()


def network_targets(policy: Policy, demonstrations: Demonstrations) -> Tensor:
    """What the network is to predict at every step, float32 [N, H, action_dim]."""
    actions = action_windows(demonstrations, policy.config.action_horizon)
    return torch.from_numpy(policy.processing.targets(actions, demonstrations.state).astype(np.float32))


def learning_rate(params: SftParams, step: int) -> float:
    """Linear warm-up to ``lr``, then a cosine down to ``min_lr`` at the last step (steps count from 1)."""
    if step <= params.warmup_steps:
        return params.lr * step / params.warmup_steps
    progress = (step - params.warmup_steps) / max(1, params.steps - params.warmup_steps)
    return params.min_lr + (params.lr - params.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def action_windows(demonstrations: Demonstrations, horizon: int) -> np.ndarray:
    """The actions of the next H steps for every step, float32 [N, H, 7]; an episode's last action is repeated."""
    return demonstrations.actions[_windows(demonstrations, horizon)]


def learnable_looks(demonstrations: Demonstrations, horizon: int) -> np.ndarray:
    """The looks, int64 [at most M], whose next H actions were executed as the expert wanted them.

    In the others the expert answers disturbances that nobody could see coming at the look: who imitates them trembles.

    Raises:
        UserError: between two disturbances there is no time for H actions, so that only ends of episodes were left; or
            these demonstrations have none.
    """
    looks = demonstrations.looks
    undisturbed = np.count_nonzero(demonstrations.disturbed[_windows(demonstrations, horizon)], axis=1) == 0
    between = BURST_PERIOD - BURST_STEPS
    if demonstrations.disturbed.any() and horizon > between:
        raise UserError(
            f"demonstrations: disturbed by demos.action_noise, with {between} steps between two disturbances; a policy "
            f"that predicts {horizon} actions needs others: collect them with demos.action_noise: 0"
        )
    if len(looks) and not undisturbed[looks].any():
        raise UserError(
            f"demonstrations: of {len(looks)} looks none is followed by {horizon} undisturbed steps; use more "
            "episodes, or a smaller demos.image_stride"
        )
    return looks[undisturbed[looks]]


def _windows(demonstrations: Demonstrations, horizon: int) -> np.ndarray:
    """The next H steps of every step within its episode, int64 [N, H]; the last one is repeated."""
    ends = np.searchsorted(demonstrations.episode, demonstrations.episode, side="right") - 1
    return np.minimum(np.arange(len(demonstrations))[:, None] + np.arange(horizon), ends[:, None])


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
