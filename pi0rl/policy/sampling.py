"""From noise to actions in K denoising steps, some of them stochastic, and the probability of what was drawn.

Time runs from 1 (noise) to 0 (actions) on the grid tau_k = 1 - k/K. With the velocity v at (x_k, tau_k) the predicted
ends are data = x - v t and noise = x + v (1 - t); a step is  x_{k+1} = w_data * data + w_noise * noise + std * N(0, I).
Samplers: flow_ode, flow_sde and flow_noise (piRL), flow_cps (coefficient-preserving sampling).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pi0rl.errors import UserError
from pi0rl.policy.model import ModelInputs, Prefix
from pi0rl.policy.policy import Policy

Method = Literal["flow_ode", "flow_sde", "flow_cps", "flow_noise"]
BATCH_MULTIPLE = 8
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class SamplerConfig:
    """How actions are drawn in training, and which log-probs are kept.

    Attributes:
        method: noise of a stochastic step.
        num_steps: K.
        action_chunk: C, the executed steps; log-probs, entropy and a chunk critic are restricted to them.
        env_action_dim: E, the action dimensions the environment uses; log-probs and entropy are restricted to them.
        noise_level: a of flow_sde and flow_cps.
        anneal: (start, end, over): the noise level changes with the RL step instead, as ``annealed_noise_level`` says.
        stochastic: ``single``: one step k* per observation is stochastic, the others are ODE steps (S = 1);
            ``last``: the same with k* = K - 1 always;
            ``all``: every step is stochastic, each with its own log-prob (S = K);
            ``joint``: every step is stochastic, one log-prob, the mean over the K steps and the prior of x_T (S = 1).
        ignore_last: ``single``: k* is never the last step.
        squared_error_log_prob: use -(x - mean)^2 as log-prob (RLinf: safe_get_logprob).
        step_shared_by: ``single``: so many consecutive episodes draw the same k* for the same chunk (RLinf: one k* for
            all that is inferred together).
    """

    method: Method = "flow_sde"
    num_steps: int = 4
    action_chunk: int = 5
    env_action_dim: int = 7
    noise_level: float = 0.5
    anneal: tuple[float, float, int] | None = None
    stochastic: Literal["single", "last", "all", "joint"] = "single"
    ignore_last: bool = False
    squared_error_log_prob: bool = False
    step_shared_by: int = 1

    def __post_init__(self) -> None:
        if self.num_steps < 2 and self.stochastic == "single" and self.ignore_last:
            raise UserError(
                "sampler: ignore_last with one denoising step leaves no stochastic step; set num_steps >= 2"
            )

    def at(self, step: int) -> SamplerConfig:
        """The sampler of RL step ``step`` (from 0): rollout and update of one step must use the same."""
        return self if self.anneal is None else replace(self, noise_level=annealed_noise_level(*self.anneal, step))


def annealed_noise_level(start: float, end: float, over: int, step: int) -> float:
    """Noise level at RL step ``step``: linear from start to end within ``over`` steps, then constant."""
    return start + (end - start) * min(step, over) / over


@dataclass(frozen=True)
class EpisodeNoise:
    """Randomness of one look: normal float32 [K + 1, H, D] (x_T, then one per step), a uniform in [0, 1) for k*."""

    normal: np.ndarray
    uniform: float


def episode_noise(
    seed: int, stream: int, iteration: int, episode: int, chunk: int, shape: tuple[int, int, int]
) -> EpisodeNoise:
    """Noise of one look as a pure function of its indices (Philox counter), whoever shares the batch.

    Args:
        stream: separates uses (training, evaluation, ...) of one seed. All indices are non-negative.
        shape: (K + 1, H, D).
    """
    generator = _look_generator(seed, stream, iteration, episode, chunk)
    uniform = generator.random()
    return EpisodeNoise(generator.standard_normal(shape, dtype=np.float32), uniform)


def step_uniform(seed: int, stream: int, iteration: int, episode: int, chunk: int) -> float:
    """The ``uniform`` of :func:`episode_noise` alone."""
    return _look_generator(seed, stream, iteration, episode, chunk).random()


def _look_generator(seed: int, stream: int, iteration: int, episode: int, chunk: int) -> np.random.Generator:
    # The lowest counter word stays free for the draws of this look.
    counter = np.array([0, chunk, episode, iteration], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], dtype=np.uint64), counter=counter))


@dataclass(frozen=True)
class SamplingNoise:
    """Randomness of a batch: initial [B, H, D], steps [B, K, H, D] (both float32 normal), uniform [B] in [0, 1)."""

    initial: Tensor
    steps: Tensor
    uniform: Tensor

    def to(self, device: torch.device | str) -> SamplingNoise:
        """The same on another device."""
        return SamplingNoise(self.initial.to(device), self.steps.to(device), self.uniform.to(device))

    def rows(self, index: Tensor) -> SamplingNoise:
        """The looks at ``index`` (int64 or bool)."""
        return SamplingNoise(self.initial[index], self.steps[index], self.uniform[index])


def stack_noise(rows: list[EpisodeNoise]) -> SamplingNoise:
    """One row per observation of the batch."""
    normal = torch.from_numpy(np.stack([row.normal for row in rows]))
    uniform = torch.tensor([row.uniform for row in rows], dtype=torch.float64)
    return SamplingNoise(normal[:, 0], normal[:, 1:], uniform)


@dataclass(frozen=True)
class Sample:
    """What a look produced.

    Attributes:
        actions: float32 [B, H, D], the end of the chain.
        chains: float32 [B, K + 1, H, D], x_T first.
        denoise_inds: int64 [B, 1] (single, last) or [B, K] (all, joint): the stochastic steps, -1 where none (eval).
        log_probs: float32 [B, S, C, E].
        values: float32 [B]; zeros without a critic.
    """

    actions: Tensor
    chains: Tensor
    denoise_inds: Tensor
    log_probs: Tensor
    values: Tensor

    def rows(self, index: Tensor) -> Sample:
        """The looks at ``index`` (int64 or bool)."""
        return Sample(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class ChainEvaluation:
    """Stored chains under the current weights: log-probs [B, S, C, E], values [B], entropy [B], and mean and std
    [B, S', C, E] of the transitions at the S' stochastic steps (``joint``: S' = K, otherwise S' = S)."""

    log_probs: Tensor
    values: Tensor
    entropy: Tensor
    mean: Tensor
    std: Tensor


def time_grid(num_steps: int) -> Tensor:
    """tau_0 = 1 .. tau_K = 0, float32 [K + 1]."""
    return torch.cat((torch.linspace(1, 1 / num_steps, num_steps), torch.zeros(1)))


def step_coefficients(method: Method, num_steps: int, noise_level: float) -> Tensor:
    """Rows (w_data, w_noise, std) for every step, float32 [3, K]; flow_noise's std is learned and 0 here."""
    tau = time_grid(num_steps)
    t, after = tau[:-1], tau[1:]
    delta = t - after
    w_data, std = 1 - after, torch.zeros_like(t)
    w_noise = after
    if method == "flow_sde":
        # At t = 1 the ratio t / (1 - t) is infinite; the next grid point stands in for it.
        sigma = noise_level * torch.sqrt(t / (1 - torch.where(t == 1, tau[1], t)))
        w_noise = after - sigma**2 * delta / (2 * t)
        std = torch.sqrt(delta) * sigma
    elif method == "flow_cps":
        w_noise = after * math.cos(math.pi * noise_level / 2)
        std = after * math.sin(math.pi * noise_level / 2)
    return torch.stack((w_data, w_noise, std))


class _Steps:
    """The transition of every denoising step under one sampler, on one device."""

    def __init__(self, policy: Policy, config: SamplerConfig, device: torch.device):
        self.policy, self.config = policy, config
        self.tau = time_grid(config.num_steps).to(device)
        self.ode = step_coefficients("flow_ode", config.num_steps, 0.0).to(device)
        self.noisy = step_coefficients(config.method, config.num_steps, config.noise_level).to(device)
        if config.method == "flow_noise" and policy.noise_head is None:
            raise UserError("sampler: flow_noise needs a policy with a noise head; add one or use flow_sde")

    def transition(self, prefix: Prefix, x: Tensor, k: Tensor, stochastic: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Distribution of x_{k+1}: mean, std [B, H, D], and the expert's features [B, H, width].

        Args: x [B, H, D]; k int64 [B]; stochastic bool [B], rows that take the noisy step instead of the ODE's.
        """
        time = self.tau[k]
        velocity, features = self.policy.model.velocity(prefix, x, time)
        t = time[:, None, None]
        data, noise = x - velocity * t, x + velocity * (1 - t)
        rows = torch.where(stochastic, self.noisy[:, k], self.ode[:, k])[:, :, None, None]
        mean, std = rows[0] * data + rows[1] * noise, rows[2].expand_as(x)
        if self.config.method == "flow_noise" and self.policy.noise_head is not None:
            std = torch.where(stochastic[:, None, None], self.policy.noise_head(features), std)
        return mean, std, features

    def log_prob(self, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Elementwise log-density on the executed part, [B, C, E]; 0 where std is 0."""
        x, mean, std = (self.executed(tensor) for tensor in (x, mean, std))
        if self.config.squared_error_log_prob:
            return -((x - mean) ** 2)
        fixed = std == 0
        safe = torch.where(fixed, torch.ones_like(std), std)
        return torch.where(fixed, 0.0, -safe.log() - _HALF_LOG_2PI - 0.5 * ((x - mean) / safe) ** 2)

    def executed(self, x: Tensor) -> Tensor:
        """[B, H, D] -> [B, C, E]."""
        return x[:, : self.config.action_chunk, : self.config.env_action_dim]

    def prior(self, x: Tensor) -> Tensor:
        """Log-density of x_T under N(0, I), [B, C, E]."""
        return self.log_prob(x, torch.zeros_like(x), torch.ones_like(x))

    def entropy(self, std: Tensor) -> Tensor:
        """Mean Gaussian entropy over the executed part, [B]; only flow_noise can change it."""
        if self.config.method != "flow_noise":
            return torch.zeros(std.shape[0], device=std.device)
        return (0.5 + _HALF_LOG_2PI + self.executed(std).log()).mean((1, 2))


def _draw_stochastic_steps(config: SamplerConfig, uniform: Tensor, train: bool) -> Tensor:
    """denoise_inds for a batch: int64 [B, 1] or [B, K]."""
    kept = 1 if config.stochastic in ("single", "last") else config.num_steps
    if not train:
        return torch.full((len(uniform), kept), -1, device=uniform.device)
    if config.stochastic == "last":
        return torch.full((len(uniform), 1), config.num_steps - 1, device=uniform.device)
    if config.stochastic == "single":
        candidates = config.num_steps - (1 if config.ignore_last else 0)
        return (uniform * candidates).long().clamp_max(candidates - 1)[:, None]
    return torch.arange(kept, device=uniform.device).expand(len(uniform), kept)


@torch.no_grad()
def sample(
    policy: Policy,
    inputs: ModelInputs | Prefix,
    noise: SamplingNoise,
    config: SamplerConfig,
    mode: Literal["train", "eval"],
    elapsed: Tensor | None = None,
) -> Sample:
    """Draw an action chunk per observation; ``eval`` takes ODE steps only (a pure function of x_T).

    On the CPU in float32 a row's bits do not depend on who shares the batch, nor on its place in it.

    Args:
        elapsed: float32 [B], see `Policy.value`.
    """
    if not policy.exact:
        return _sample(policy, inputs, noise, config, mode, elapsed)
    drawn, places = [], []
    for rows in _alike(inputs):
        # Matrix products treat the last few rows of an uneven batch by another code path, with other rounding.
        padded = torch.cat((rows, rows[-1:].expand(-len(rows) % BATCH_MULTIPLE)))
        time = None if elapsed is None else elapsed[padded]
        part = _sample(policy, inputs.rows(padded), noise.rows(padded), config, mode, time)
        drawn.append(part.rows(torch.arange(len(rows))))
        places.append(rows)
    order = torch.cat(places).argsort()
    return Sample(*(torch.cat([getattr(part, name) for part in drawn])[order] for name in Sample.__dataclass_fields__))


def _alike(inputs: ModelInputs | Prefix) -> list[Tensor]:
    """Row numbers in groups whose computation has the same shapes: the same cameras, prompts of like lengths."""
    if isinstance(inputs, Prefix):
        return [torch.arange(len(inputs))]
    layouts = torch.cat((inputs.image_mask, inputs.language_lengths()[:, None]), dim=1)
    _, group = layouts.unique(dim=0, return_inverse=True)
    return [(group == number).nonzero()[:, 0] for number in range(int(group.max()) + 1)]


def _sample(
    policy: Policy,
    inputs: ModelInputs | Prefix,
    noise: SamplingNoise,
    config: SamplerConfig,
    mode: Literal["train", "eval"],
    elapsed: Tensor | None,
) -> Sample:
    prefix = inputs if isinstance(inputs, Prefix) else policy.prefix(inputs)
    steps = _Steps(policy, config, noise.initial.device)
    chosen = _draw_stochastic_steps(config, noise.uniform, train=mode == "train")
    x = noise.initial
    chain, log_probs, values = [x], [], []
    for index in range(config.num_steps):
        k = torch.full((len(x),), index, device=x.device)
        mean, std, features = steps.transition(prefix, x, k, (chosen == index).any(1))
        x = mean + std * noise.steps[:, index]
        chain.append(x)
        log_probs.append(steps.log_prob(x, mean, std))
        values.append(policy.value(prefix, features, config.action_chunk, elapsed))
    per_step, value_steps = torch.stack(log_probs, dim=1), torch.stack(values, dim=1)
    if config.stochastic in ("single", "last"):
        kept = per_step.gather(1, chosen.clamp_min(0)[:, :, None, None].expand(-1, -1, *per_step.shape[2:]))
    elif config.stochastic == "joint":
        kept = (steps.prior(noise.initial) + per_step.sum(1))[:, None] / (config.num_steps + 1)
    else:
        kept = per_step
    at_chosen = policy.critic_config is not None and policy.critic_config.matches_rollout and mode == "train"
    value = value_steps.gather(1, chosen).mean(1) if at_chosen else value_steps.mean(1)
    return Sample(x, torch.stack(chain, dim=1), chosen, kept, value)


def evaluate_chains(
    policy: Policy,
    inputs: ModelInputs | Prefix,
    chains: Tensor,
    denoise_inds: Tensor,
    config: SamplerConfig,
    elapsed: Tensor | None = None,
) -> ChainEvaluation:
    """Log-probs, values and entropy of stored chains under the current weights, with gradients.

    Args:
        inputs: observations, or their prefix computed beforehand (once per update, where the prefix is frozen).
        chains: float32 [B, K + 1, H, D]; denoise_inds: int64 [B, 1] or [B, K], as ``sample`` returned them in training.
        elapsed: float32 [B], see `Policy.value`.
    """
    prefix = inputs if isinstance(inputs, Prefix) else policy.prefix(inputs)
    steps = _Steps(policy, config, chains.device)
    rows = torch.arange(len(chains), device=chains.device)
    everywhere = torch.ones_like(rows, dtype=torch.bool)
    log_probs, values, entropies, means, stds = [], [], [], [], []
    for k in denoise_inds.unbind(1):
        mean, std, features = steps.transition(prefix, chains[rows, k], k, everywhere)
        log_probs.append(steps.log_prob(chains[rows, k + 1], mean, std))
        values.append(policy.value(prefix, features, config.action_chunk, elapsed))
        entropies.append(steps.entropy(std))
        means.append(steps.executed(mean))
        stds.append(steps.executed(std))
    kept = torch.stack(log_probs, dim=1)
    entropy = torch.stack(entropies, dim=1)
    if config.stochastic == "joint":
        terms = config.num_steps + 1
        kept = (steps.prior(chains[:, 0]) + kept.sum(1))[:, None] / terms
        entropy = torch.cat((entropy, steps.entropy(torch.ones_like(chains[:, 0]))[:, None]), dim=1)
    return ChainEvaluation(
        log_probs=kept,
        values=torch.stack(values, dim=1).mean(1),
        entropy=entropy.mean(1),
        mean=torch.stack(means, dim=1),
        std=torch.stack(stds, dim=1),
    )
