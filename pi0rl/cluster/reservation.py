"""A placement turned into a Ray placement group: all that a run needs, reserved in one step before anything starts.

There is one bundle per GPU, which its rollout and actor share, and one per node with the cores of its env workers.
Ray counts GPUs but does not say which; the workers themselves take the one that the placement names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import ray
from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pi0rl.cluster.placement import Component, Placement, Seat
from pi0rl.cluster.session import Node, cluster_nodes
from pi0rl.errors import UserError

# Reserving takes milliseconds unless somebody else holds what is wanted.
RESERVE_SECONDS = 60.0
# A node without env workers: a worker that needs no core has to be put into some bundle.
SOME_CORE = 0.01


class Reservation:
    """Room for the processes of ``components`` where ``placement`` says.

    Args:
        placement: who runs where.
        env_workers: how many simulator processes; each takes a core.
        components: those that will run; an evaluation has no actor.

    Raises:
        UserError: a node has fewer cores than env workers, or somebody else holds what is wanted.
    """

    def __init__(
        self,
        placement: Placement,
        env_workers: int,
        components: Sequence[Component] = ("env", "rollout", "actor"),
        seconds: float = RESERVE_SECONDS,
    ) -> None:
        nodes = cluster_nodes()
        self.placement = placement
        self._env_seats = placement.env_seats(env_workers) if "env" in components else ()
        torch_seats = [seat for name in components if name != "env" for seat in placement.seats(name)]
        cores = Counter(seat.node for seat in self._env_seats)
        used = {seat.node for seat in (*self._env_seats, *torch_seats)}
        refuse_lost_nodes(used, nodes)
        refuse_too_few_cores(cores, nodes)
        on_node = sorted({*cores, *(seat.node for seat in torch_seats if seat.gpu is None)})
        on_gpu = sorted({(seat.node, seat.gpu) for seat in torch_seats if seat.gpu is not None})
        bundles = [{"CPU": cores[node] or SOME_CORE} for node in on_node] + [{"GPU": 1.0}] * len(on_gpu)
        places = [*(Seat(node) for node in on_node), *(Seat(node, gpu) for node, gpu in on_gpu)]
        self._bundle_of = {place: index for index, place in enumerate(places)}
        labels = [{"ray.io/node-id": nodes[place.node].identity} for place in places]
        self._group = placement_group(bundles, strategy="PACK", bundle_label_selector=labels)
        if not self._group.wait(seconds):
            remove_placement_group(self._group)
            refuse_lost_nodes(used, nodes)  # one that died a moment ago was still listed
            raise UserError(_refusal(on_gpu, cores, nodes, seconds))

    def env_options(self, worker: int) -> dict[str, Any]:
        """Ray's options for env worker ``worker``."""
        return {"num_cpus": 1, "num_gpus": 0} | self._strategy(Seat(self._env_seats[worker].node))

    def env_gpu(self, worker: int) -> int | None:
        """The GPU of its node that env worker ``worker`` is placed on, if it is."""
        return self._env_seats[worker].gpu

    def seat_options(self, seat: Seat) -> dict[str, Any]:
        """Ray's options for the torch process on ``seat``; rollout and actor share one, and take turns on the cores."""
        return {"num_cpus": 0, "num_gpus": 0 if seat.gpu is None else 1} | self._strategy(seat)

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *_: object) -> None:
        """Give everything back; processes in it end."""
        remove_placement_group(self._group)

    def _strategy(self, seat: Seat) -> dict[str, Any]:
        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, self._bundle_of[seat])}


def refuse_lost_nodes(used: set[int], nodes: Sequence[Node]) -> None:
    """Raises UserError where one of the nodes ``used``, by their numbers among ``nodes``, is not there any more."""
    alive = {node.identity for node in cluster_nodes()}
    if any(node >= len(nodes) or nodes[node].identity not in alive for node in used):
        raise UserError(
            f"cluster.component_placement: a node of it is not there any more, Ray has {len(alive)} nodes left; "
            "start it again (`ray start --address ...`), or place on the others, and run the same command to resume"
        )


def refuse_too_few_cores(workers: Counter[int], nodes: Sequence[Node]) -> None:
    """Raises UserError where a node would get more env workers than it has cores."""
    for node, count in sorted(workers.items()):
        if count > nodes[node].cores:
            most = sum(int(nodes[other].cores) for other in workers)
            raise UserError(
                f"cluster.component_placement.env: {count} env workers on node {node} ({nodes[node].address}), which "
                f"has {nodes[node].cores:g} cores; expected at most {most} env workers on the nodes of this placement: "
                "lower env.train.workers and env.eval.workers, or place env on more nodes"
            )


def _refusal(gpus: Sequence[tuple[int, int]], cores: Counter[int], nodes: Sequence[Node], seconds: float) -> str:
    wanted = Counter(node for node, _ in gpus)
    free = ray.available_resources()
    parts = [
        f"{wanted[node]} GPUs and {cores[node]} cores of node {node} ({nodes[node].address})"
        for node in sorted({*wanted, *cores})
    ]
    return (
        f"waited {seconds:.0f} s for Ray to reserve {', '.join(parts)}; free are {free.get('GPU', 0):g} GPUs and "
        f"{free.get('CPU', 0):g} cores in all: another job holds the rest (`ray status`), end it or place less"
    )
