"""The process on one seat: one copy of the policy, which acts, learns, or does both by turns.

Where rollout and actor are placed on one GPU (or on cores) there is nothing to hand over: the weights that act are the
weights that were updated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from pi0rl.cluster.actor_worker import ActorWorker
from pi0rl.cluster.rollout_worker import NoiseKey, PlayMode, RolloutWorker
from pi0rl.cluster.team import meeting_place
from pi0rl.errors import WorkerFailed
from pi0rl.libero.plan import Episode
from pi0rl.libero.slots import Look
from pi0rl.rl.config import RewardConfig
from pi0rl.rl.trajectories import Trajectory


class PolicyWorker:
    """A rollout worker, an actor worker, or both over one policy; which, the placement says.

    Args:
        make_rollout, make_actor: make them in this process; None where the seat has none.
    """

    def __init__(
        self, make_rollout: Callable[[], RolloutWorker] | None, make_actor: Callable[[], ActorWorker] | None
    ) -> None:
        self._rollout = None if make_rollout is None else make_rollout()
        self._actor = None if make_actor is None else make_actor()
        self._collected: list[Trajectory] = []
        self._version: int | None = 0

    def start(self) -> None:
        """Load the policy, once."""
        if self._actor is not None:
            self._actor.start()
        if self._rollout is not None:
            self._rollout.start(None if self._actor is None else self._actor.policy)

    # What a rollout worker does.

    def begin(self, noise: NoiseKey, mode: PlayMode, version: int = 0) -> None:
        """See `RolloutWorker.begin`; a WorkerFailed unless the weights here are those of ``version``."""
        if self._version != version:
            has = "weights that were never handed over" if self._version is None else f"version {self._version}"
            raise WorkerFailed(f"weights: version {version} is to be played with, a rollout worker has {has}")
        self._acting.begin(noise, mode)

    def act(self, look: Look) -> np.ndarray:
        return self._acting.act(look)

    def forget(self, episodes: Sequence[int]) -> None:
        self._acting.forget(episodes)

    def trajectories(
        self, plan: tuple[Episode, ...], rewards: RewardConfig, max_episode_steps: int
    ) -> list[Trajectory]:
        return self._acting.trajectories(plan, rewards, max_episode_steps)

    def load(self, weights: dict[str, Tensor], version: int) -> None:
        self._acting.load(weights)
        self._version = version

    def acting_seconds(self) -> float:
        return self._acting.seconds

    # What an actor worker does.

    def rendezvous(self) -> str:
        """An address on this node at which the actors may meet."""
        return meeting_place()

    def join(self, address: str, rank: int, size: int) -> None:
        self._learning.join(address, rank, size)

    def resume(self, directory: Path | None) -> None:
        self._version = None
        self._learning.resume(directory)

    def save(self, directory: Path) -> None:
        self._learning.save(directory)

    def announce(self, version: int) -> None:
        """The weights are as they are to be handed over, and have a name."""
        self._version = version

    def show_average(self) -> None:
        self._version = None
        self._learning.show_average()

    def put_back(self) -> None:
        self._version = None
        self._learning.put_back()

    def weights(self) -> dict[str, Tensor]:
        return self._learning.weights()

    def collect(self, plan: tuple[Episode, ...], rewards: RewardConfig, max_episode_steps: int) -> None:
        """Keep what was played here for ``update``: it need not leave the process."""
        self._collected = self._acting.trajectories(plan, rewards, max_episode_steps)

    def update(
        self, iteration: int, max_episode_steps: int, *parts: list[Trajectory], lr_factor: float = 1.0
    ) -> dict[str, float]:
        """See `ActorWorker.update`; what was collected here comes on top of ``parts``."""
        own, self._collected, self._version = self._collected, [], None
        return self._learning.update(iteration, max_episode_steps, own, *parts, lr_factor=lr_factor)

    @property
    def _acting(self) -> RolloutWorker:
        assert self._rollout is not None, "this seat has no rollout worker"
        return self._rollout

    @property
    def _learning(self) -> ActorWorker:
        assert self._actor is not None, "this seat has no actor"
        return self._actor
