"""What a rollout is: episodes of real chunks, and how an iteration's episodes become one set of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from pi0rl.observation import Observation
from pi0rl.rl.config import RewardConfig


@dataclass(frozen=True)
class Trajectory:
    """One finished episode of T chunks of C executed actions; nothing is padded.

    Only ``compat="rlinf"`` rollouts go on after success; then T reaches the horizon and ``dones`` says which steps
    come after the end.

    Attributes:
        episode: index in the iteration's plan; decides the order of samples.
        group: GRPO group (episodes that share task and initial state).
        simulated: environment steps that were simulated, those after the end included.
        rewards: float32 [T, C], see :func:`shape_rewards`.
        success: bool [T, C], the task's predicate after every step.
        dones: bool [T, C], success or time limit, see :func:`step_dones`. The last chunk must be done.
        log_probs: float32 [T, S, C, E] of the executed actions, one per stochastic denoising step.
        values: float32 [T], the critic's estimate at the start of every chunk (zeros without a critic).
        chains: float32 [T, K+1, H, D], the denoising chain from noise to actions.
        denoise_inds: int64 [T, S], which denoising steps were stochastic.
        observation: T rows, what the policy saw at the start of every chunk.
    """

    episode: int
    group: int
    simulated: int
    rewards: np.ndarray
    success: np.ndarray
    dones: np.ndarray
    log_probs: np.ndarray
    values: np.ndarray
    chains: np.ndarray
    denoise_inds: np.ndarray
    observation: Observation

    def __post_init__(self) -> None:
        chunks = len(self)
        for name in ("success", "dones", "log_probs", "values", "chains", "denoise_inds", "observation"):
            if len(getattr(self, name)) != chunks:
                raise ValueError(f"episode {self.episode}: {name} has {len(getattr(self, name))} rows, not {chunks}")
        if chunks == 0 or not self.dones[-1].any():
            raise ValueError(f"episode {self.episode}: the last of its {chunks} chunks is not done")

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def steps(self) -> int:
        """Environment steps up to and including the first done one."""
        return int(np.argmax(self.dones.reshape(-1))) + 1

    @property
    def succeeded(self) -> bool:
        return bool(self.success.reshape(-1)[: self.steps].any())


def step_dones(success: np.ndarray, max_episode_steps: int) -> np.ndarray:
    """bool [T, C]: step n = 0, 1, ... is done on success or when ``n + 1 >= max_episode_steps``."""
    elapsed = np.arange(1, success.size + 1).reshape(success.shape)
    return success | (elapsed >= max_episode_steps)


def elapsed_time(chunks: np.ndarray, max_episode_steps: int, chunk: int) -> np.ndarray:
    """How much of an episode's time is over after ``chunks`` chunks of ``chunk`` steps: float32, in [0, 1]."""
    allowed = -(-max_episode_steps // chunk)
    return (chunks / allowed).astype(np.float32)


def shape_rewards(success: np.ndarray, config: RewardConfig) -> np.ndarray:
    """Per-step rewards, float32 [T, C], of one episode (REFERENCE: LIBERO's sparse reward).

    ``r_n = reward_coef * success_n - [use_step_penalty]``; with ``use_rel_reward`` the change ``r_n - r_{n-1}`` is
    emitted instead (``r_{-1} = 0``). With ``latch_success`` rewards after the first success are 0.

    Args:
        success: bool [T, C].
    """
    flat = success.reshape(-1)
    reward = config.reward_coef * flat.astype(np.float32) - np.float32(config.use_step_penalty)
    if config.use_rel_reward:
        reward = np.diff(reward, prepend=np.float32(0.0))
    if config.latch_success:
        over = np.concatenate(([False], np.logical_or.accumulate(flat)[:-1]))
        reward = np.where(over, 0.0, reward)
    return reward.astype(np.float32).reshape(success.shape)


@dataclass(frozen=True)
class SampleInputs:
    """What the policy needs to recompute the log-probs of n samples (see :class:`Trajectory` for the fields).

    Attributes:
        chunks: int64 [n], how many chunks of the episode came before.
    """

    observation: Observation
    chains: np.ndarray
    denoise_inds: np.ndarray
    chunks: np.ndarray


class Rollout:
    """All episodes of an iteration, in the order of their index whatever order they finished in.

    The samples (real chunks) are numbered chunk by chunk, and by episode within a chunk: the time-major order of a
    padded [T, B] array without its padding.

    Attributes:
        trajectories: B episodes by increasing index.
        real: bool [T, B], which entries of a padded array are chunks that exist.
        rewards: float32 [T, B, C], 0 where not real.
        dones: bool [T+1, B, C]; entry 0 is before the first chunk (False), True where not real.
        values: float32 [T+1, B, 1], 0 where not real and after the end.
        groups: int64 [B].
    """

    def __init__(self, trajectories: Iterable[Trajectory]) -> None:
        self.trajectories = tuple(sorted(trajectories, key=lambda trajectory: trajectory.episode))
        if not self.trajectories:
            raise ValueError("a rollout needs at least one episode")
        if len({trajectory.episode for trajectory in self.trajectories}) < len(self.trajectories):
            raise ValueError("a rollout holds every episode once")
        horizon = max(len(trajectory) for trajectory in self.trajectories)
        episodes, chunk = len(self.trajectories), self.trajectories[0].rewards.shape[1]
        self.real = torch.zeros(horizon, episodes, dtype=torch.bool)
        self.rewards = torch.zeros(horizon, episodes, chunk)
        self.dones = torch.ones(horizon + 1, episodes, chunk, dtype=torch.bool)
        self.dones[0] = False
        self.values = torch.zeros(horizon + 1, episodes, 1)
        for column, trajectory in enumerate(self.trajectories):
            rows = len(trajectory)
            self.real[:rows, column] = True
            self.rewards[:rows, column] = torch.from_numpy(np.array(trajectory.rewards, dtype=np.float32))
            self.dones[1 : rows + 1, column] = torch.from_numpy(np.array(trajectory.dones, dtype=bool))
            self.values[:rows, column, 0] = torch.from_numpy(np.array(trajectory.values, dtype=np.float32))
        self.groups = torch.tensor([trajectory.group for trajectory in self.trajectories])
        self._places: list[tuple[int, int]] = [(int(t), int(b)) for t, b in self.real.nonzero()]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._places)

    def inputs(self, samples: Iterable[int]) -> SampleInputs:
        """The given samples' rows, gathered now: no second copy of the images is kept."""
        places = [self._places[int(sample)] for sample in samples]

        def rows(array_of: Callable[[Trajectory], np.ndarray]) -> np.ndarray:
            return np.stack([array_of(self.trajectories[b])[t] for t, b in places])

        observation = Observation(
            base_image=rows(lambda trajectory: trajectory.observation.base_image),
            wrist_image=rows(lambda trajectory: trajectory.observation.wrist_image),
            state=rows(lambda trajectory: trajectory.observation.state),
            prompt=tuple(self.trajectories[b].observation.prompt[t] for t, b in places),
        )
        return SampleInputs(
            observation=observation,
            chains=rows(lambda trajectory: trajectory.chains),
            denoise_inds=rows(lambda trajectory: trajectory.denoise_inds),
            chunks=np.array([t for t, _ in places]),
        )

    def log_probs(self) -> torch.Tensor:
        """float32 [N, S, C, E], as recorded while rolling out."""
        return torch.from_numpy(np.stack([self.trajectories[b].log_probs[t] for t, b in self._places]))
