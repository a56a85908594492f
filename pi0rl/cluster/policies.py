"""The driver's side of the processes that hold the policy: started where the placement says, updated, kept equal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError

from pi0rl.cluster.actor_worker import ActorWorker
from pi0rl.cluster.policy_worker import PolicyWorker
from pi0rl.cluster.reservation import Reservation
from pi0rl.cluster.rollout_worker import RolloutWorker
from pi0rl.cluster.waiting import UPDATE_SECONDS, WAIT_SECONDS, fetch, fetch_all, first_line
from pi0rl.errors import WorkerFailed
from pi0rl.libero.plan import Episode
from pi0rl.rl.config import RewardConfig

MakeRollout = Callable[[str], RolloutWorker]
MakeActor = Callable[[str], ActorWorker]
"""Device, as torch calls it -> the component."""


@dataclass(frozen=True)
class Policies:
    """Ray's handles of the processes that act and of those that learn; one may be both."""

    rollouts: tuple[Any, ...]
    actors: tuple[Any, ...] = ()

    @property
    def copies(self) -> tuple[Any, ...]:
        """Those that act with a copy of the weights."""
        actors = {actor._actor_id for actor in self.actors}
        return tuple(rollout for rollout in self.rollouts if rollout._actor_id not in actors)


def start_policies(room: Reservation, make_rollout: MakeRollout, make_actor: MakeActor | None = None) -> Policies:
    """One process per seat of rollout and actor, with its policy loaded; without ``make_actor`` none learns."""
    placement = room.placement
    rollouts, actors = placement.seats("rollout"), placement.seats("actor") if make_actor else ()
    worker_class = ray.remote(PolicyWorker)
    workers = {}
    for seat in dict.fromkeys([*actors, *rollouts]):
        device = placement.device(seat)
        workers[seat] = worker_class.options(**room.seat_options(seat)).remote(
            partial(make_rollout, device) if seat in rollouts else None,
            partial(make_actor, device) if make_actor and seat in actors else None,
        )
    fetch_all([worker.start.remote() for worker in workers.values()], "the policy to be loaded")
    policies = Policies(tuple(workers[seat] for seat in rollouts), tuple(workers[seat] for seat in actors))
    if len(actors) > 1:
        address = fetch(policies.actors[0].rendezvous.remote(), "an address for the actors")
        ranks = [actor.join.remote(address, rank, len(actors)) for rank, actor in enumerate(policies.actors)]
        fetch_all(ranks, f"the {len(actors)} actors to meet at {address}")
    return policies


class Learner:
    """The actor component: one process or several that make the same update.

    Args:
        policies: the processes.
        averages: whether an average of the trained weights is kept, which is what the run makes.

    Attributes:
        version: of the weights that were handed over last; 0 are those that the processes began with.
    """

    def __init__(self, policies: Policies, averages: bool = False) -> None:
        self._policies, self._averages = policies, averages
        self.version = 0

    def resume(self, directory: Path | None) -> None:
        """Everybody has the weights that ``save`` wrote there, the actors their optimiser too; None: as begun."""
        fetch_all([actor.resume.remote(directory) for actor in self._policies.actors], "the actor to read a checkpoint")
        self.hand_over()

    def save(self, directory: Path, seconds: float = WAIT_SECONDS) -> None:
        """Policy and optimiser into the existing ``directory``."""
        fetch_all([actor.save.remote(directory) for actor in self._policies.actors], "the actor's checkpoint", seconds)

    def update(
        self,
        iteration: int,
        plan: Sequence[Episode],
        rewards: RewardConfig,
        max_episode_steps: int,
        lr_factor: float,
    ) -> dict[str, float]:
        """Learn from the plan that was just played; returns the iteration's metrics."""
        policies, what = self._policies, (tuple(plan), rewards, max_episode_steps)
        away = policies.rollouts
        if len(policies.actors) == 1 and len(policies.copies) < len(policies.rollouts):
            away = policies.copies
            fetch(policies.actors[0].collect.remote(*what), "the actor to collect its episodes")
        parts = [rollout.trajectories.remote(*what) for rollout in away]
        updates = [
            actor.update.remote(iteration, max_episode_steps, *parts, lr_factor=lr_factor) for actor in policies.actors
        ]
        try:
            return fetch_all(updates, "the actor's update", UPDATE_SECONDS)[0]
        except RayTaskError as error:
            if len(policies.actors) == 1:
                raise
            # where one of several is gone, what the others do together with it fails
            raise WorkerFailed(f"an actor failed in the update ({first_line(error)})") from error

    def hand_over(self) -> None:
        """The trained weights, as a new version, to whoever acts with a copy; its number alone where one process does
        both."""
        version = self.version + 1
        fetch_all([actor.announce.remote(version) for actor in self._policies.actors], "the actor's weights")
        if self._policies.copies:
            weights = self._policies.actors[0].weights.remote()
            loads = [rollout.load.remote(weights, version) for rollout in self._policies.copies]
            fetch_all(loads, "the rollout workers to take over the weights")
        self.version = version

    @contextmanager
    def as_saved(self) -> Iterator[None]:
        """In the block everybody acts with the weights that a saved policy would have: the average, where one is kept.

        After an error they stay so: whoever goes on starts the processes again.
        """
        if not self._averages:
            yield
            return
        actors = self._policies.actors
        fetch_all([actor.show_average.remote() for actor in actors], "the actor's average")
        self.hand_over()
        yield
        fetch_all([actor.put_back.remote() for actor in actors], "the actor to put its weights back")
        self.hand_over()
