"""The rollout component: a Ray actor that turns looks into actions and keeps what training needs of them."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from pi0rl.libero.plan import Episode
from pi0rl.libero.slots import IDLE, Look, Played
from pi0rl.observation import Observation
from pi0rl.policy.checkpoints import load_policy
from pi0rl.policy.lora import LoraConfig, with_lora
from pi0rl.policy.policy import Policy
from pi0rl.policy.sampling import (
    EpisodeNoise,
    Sample,
    SamplerConfig,
    episode_noise,
    sample,
    stack_noise,
    step_uniform,
)
from pi0rl.rl.config import RewardConfig
from pi0rl.rl.trajectories import Trajectory, elapsed_time, shape_rewards, step_dones

PlayMode = Literal["train", "eval"]


@dataclass(frozen=True)
class NoiseKey:
    """Names the randomness of a plan's episodes: noise depends on this, the episode and the chunk alone."""

    seed: int
    stream: int
    iteration: int


@dataclass(frozen=True)
class _Chunk:
    """One look at one episode and what the policy made of it."""

    observation: Observation
    chain: np.ndarray
    denoise_inds: np.ndarray
    log_probs: np.ndarray
    value: float


@dataclass
class _Recording:
    """An episode in the making."""

    chunks: list[_Chunk] = field(default_factory=list)
    success: list[np.ndarray] = field(default_factory=list)
    steps: int = 0


class RolloutWorker:
    """A policy that acts for the env workers that are wired to it.

    Args:
        max_episode_steps: training's limit; None in evaluations, where nobody asks for values.

    Attributes:
        seconds: spent on acting since ``begin``.
    """

    def __init__(
        self,
        checkpoint: Path,
        sampler: SamplerConfig,
        lora: LoraConfig | None,
        num_threads: int,
        device: str,
        compiled: bool = False,
        max_episode_steps: int | None = None,
    ) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        torch.use_deterministic_algorithms(True)
        self._num_threads, self._checkpoint, self._annealed, self._device = num_threads, checkpoint, sampler, device
        self._sampler, self._lora, self._compiled = sampler.at(0), lora, compiled
        self._max_episode_steps = max_episode_steps
        self._noise = NoiseKey(0, 0, 0)
        self._mode: PlayMode = "eval"
        self._recordings: dict[int, _Recording] = {}
        self.seconds = 0.0

    def start(self, policy: Policy | None = None) -> None:
        """Load the policy, or act with the one given. Not done when the Ray actor is created: it would hide why it
        failed."""
        if policy is None:
            policy = with_lora(load_policy(self._checkpoint), self._lora).to(self._device)
            if self._compiled:
                policy.model.compile_layers()
        self._policy = policy

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """Take over weights from the actor; the names may be a part of the policy's."""
        own = self._policy.named_weights()
        with torch.no_grad():
            for name, value in weights.items():
                own[name].copy_(value)

    def begin(self, noise: NoiseKey, mode: PlayMode) -> None:
        """Before the first look of a plan; in mode ``train`` the episodes are recorded."""
        torch.set_num_threads(self._num_threads)
        self._noise, self._mode = noise, mode
        self._sampler = self._annealed.at(noise.iteration)
        self._recordings = {}
        self.seconds = 0.0

    def forget(self, episodes: Sequence[int]) -> None:
        """Drop what was recorded of ``episodes``: they are played again."""
        for episode in episodes:
            self._recordings.pop(episode, None)

    def act(self, look: Look) -> np.ndarray:
        """Actions float64 [M, C, 7] for M slots (a fixed number, so that batching never changes a bit)."""
        started = time.perf_counter()
        actions = self._act(look)
        self.seconds += time.perf_counter() - started
        return actions

    def _act(self, look: Look) -> np.ndarray:
        if self._mode == "train" and look.played is not None:
            self._take_in(look.played)
        if not look.running:
            return np.zeros(0)
        config, model = self._sampler, self._policy.config
        shape = (config.num_steps + 1, model.action_horizon, model.action_dim)
        noise = stack_noise(
            [
                self._look_noise(max(int(episode), 0), int(chunk), shape)
                for episode, chunk in zip(look.episode, look.chunk, strict=True)
            ]
        ).to(self._device)
        inputs = self._policy.processing.inputs(look.observation).to(self._device)
        drawn = sample(self._policy, inputs, noise, config, self._mode, self._elapsed(look))
        if self._mode == "train":
            self._record(look, drawn)
        actions = self._policy.processing.env_actions(drawn.actions.cpu(), look.observation)
        return actions[:, : config.action_chunk]

    def trajectories(
        self, plan: tuple[Episode, ...], rewards: RewardConfig, max_episode_steps: int
    ) -> list[Trajectory]:
        """The recorded episodes of this worker; ``plan`` is the whole plan, rows by index."""
        return [
            _trajectory(recording, plan[index], rewards, max_episode_steps)
            for index, recording in sorted(self._recordings.items())
        ]

    def _elapsed(self, look: Look) -> torch.Tensor | None:
        if self._max_episode_steps is None:
            return None
        elapsed = elapsed_time(look.chunk, self._max_episode_steps, self._sampler.action_chunk)
        return torch.from_numpy(elapsed).to(self._device)

    def _look_noise(self, episode: int, chunk: int, shape: tuple[int, int, int]) -> EpisodeNoise:
        noise, shared = episode_noise(*self._key(), episode, chunk, shape), self._sampler.step_shared_by
        if shared == 1:
            return noise
        return replace(noise, uniform=step_uniform(*self._key(), episode - episode % shared, chunk))

    def _key(self) -> tuple[int, int, int]:
        return self._noise.seed, self._noise.stream, self._noise.iteration

    def _take_in(self, played: Played) -> None:
        for episode, success, steps in zip(played.episode, played.success, played.steps, strict=True):
            if episode != IDLE:
                recording = self._recordings[int(episode)]
                recording.success.append(success)
                recording.steps += int(steps)

    def _record(self, look: Look, drawn: Sample) -> None:
        chains, inds, log_probs, values = (
            tensor.cpu().numpy() for tensor in (drawn.chains, drawn.denoise_inds, drawn.log_probs, drawn.values)
        )
        seen = look.observation
        for row, episode in enumerate(look.episode):
            if episode == IDLE:
                continue
            one = slice(row, row + 1)
            observation = Observation(seen.base_image[one], seen.wrist_image[one], seen.state[one], seen.prompt[one])
            chunk = _Chunk(observation, chains[row], inds[row], log_probs[row], float(values[row]))
            self._recordings.setdefault(int(episode), _Recording()).chunks.append(chunk)


def _trajectory(recording: _Recording, episode: Episode, rewards: RewardConfig, max_episode_steps: int) -> Trajectory:
    chunks, success = recording.chunks, np.stack(recording.success)
    seen = [chunk.observation for chunk in chunks]
    return Trajectory(
        episode=episode.index,
        group=episode.group,
        simulated=recording.steps,
        rewards=shape_rewards(success, rewards),
        success=success,
        dones=step_dones(success, max_episode_steps),
        log_probs=np.stack([chunk.log_probs for chunk in chunks]),
        values=np.array([chunk.value for chunk in chunks], dtype=np.float32),
        chains=np.stack([chunk.chain for chunk in chunks]),
        denoise_inds=np.stack([chunk.denoise_inds for chunk in chunks]),
        observation=Observation(
            np.concatenate([o.base_image for o in seen]),
            np.concatenate([o.wrist_image for o in seen]),
            np.concatenate([o.state for o in seen]),
            tuple(prompt for o in seen for prompt in o.prompt),
        ),
    )
