"""``cluster.component_placement`` -> which GPUs, or which nodes' cores, each component runs on.

The published forms: ``env: 0-3``, ``rollout: 4-7``, ``actor: 0-7``; ``env,rollout,actor: all``; ``env: 0-1``,
``rollout: 2-5``, ``actor: 6-7``. GPUs are numbered through all nodes: with 8 per node, 9 is the second of the second
node. ``cpu`` means cores; ``{node_group: node, placement: 0-1}`` means the cores of these nodes. Rollout and actor have
one process per GPU (or per node named); simulators need cores wherever they are placed: ``env: 0-3`` says that they run
on the nodes of these GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from pi0rl.errors import UserError
from pi0rl.params import ClusterParams

Component = Literal["env", "rollout", "actor"]
COMPONENTS: tuple[Component, ...] = ("env", "rollout", "actor")


@dataclass(frozen=True)
class Seat:
    """Where one process runs: on GPU ``gpu`` of node ``node`` (both from 0), or on that node's cores."""

    node: int
    gpu: int | None = None


@dataclass(frozen=True)
class Placement:
    """Who runs where.

    Attributes:
        env, rollout, actor: GPU numbers through all nodes; empty: on cores.
        gpus_per_node: the nodes, and how many GPUs each has.
        nodes: for components on cores that name nodes, which.
        accelerator: ``cpu`` where the cluster's GPUs are only logical ones, as in tests.
    """

    env: tuple[int, ...]
    rollout: tuple[int, ...]
    actor: tuple[int, ...]
    gpus_per_node: tuple[int, ...] = (0,)
    nodes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    accelerator: Literal["cuda", "cpu"] = "cuda"

    @property
    def gpus(self) -> tuple[int, ...]:
        """Every GPU that some component uses."""
        return tuple(sorted({*self.env, *self.rollout, *self.actor}))

    def sharers(self, gpu: int) -> int:
        """How many torch components (rollout, actor) share ``gpu``."""
        return (gpu in self.rollout) + (gpu in self.actor)

    def seats(self, component: Component) -> tuple[Seat, ...]:
        """Where its processes run, one per GPU or node; simulators are dealt out over them, see ``env_seats``."""
        gpus: tuple[int, ...] = getattr(self, component)
        if gpus:
            return tuple(self._seat(gpu) for gpu in gpus)
        everywhere = range(len(self.gpus_per_node)) if component == "env" else (0,)
        return tuple(Seat(node) for node in self.nodes.get(component, everywhere))

    def env_seats(self, workers: int) -> tuple[Seat, ...]:
        """Where each of the env workers runs: as many on one seat as on another, give or take one."""
        seats = self.seats("env")
        return tuple(seats[worker * len(seats) // workers] for worker in range(workers))

    def device(self, seat: Seat) -> str:
        """What torch calls the device of ``seat``."""
        return "cpu" if seat.gpu is None or self.accelerator == "cpu" else f"cuda:{seat.gpu}"

    def _seat(self, gpu: int) -> Seat:
        node = 0
        while gpu >= self.gpus_per_node[node]:
            gpu -= self.gpus_per_node[node]
            node += 1
        return Seat(node, gpu)


def resolve_placement(cluster: ClusterParams, gpus_per_node: Sequence[int]) -> Placement:
    """Read ``cluster.component_placement`` for nodes with so many GPUs each.

    Raises:
        UserError: an unknown or missing component, something malformed, or a GPU or node that does not exist; it says
            which placements would fit.
    """
    gpus_per_node = tuple(gpus_per_node[: cluster.num_nodes])
    gpus: dict[str, tuple[int, ...]] = {}
    nodes: dict[str, tuple[int, ...]] = {}
    for key, value in cluster.component_placement.items():
        for component in (part.strip() for part in key.split(",")):
            where = f"cluster.component_placement.{component}"
            if component not in COMPONENTS:
                near = get_close_matches(component, COMPONENTS, 1)
                hint = f"did you mean {near[0]}?" if near else "leave it out"
                raise UserError(f"{where}: unknown component, expected {', '.join(COMPONENTS)}; {hint}")
            if component in gpus:
                raise UserError(f"{where}: placed twice; name each component once")
            gpus[component], on_nodes = _places(value, gpus_per_node, where)
            if on_nodes:
                nodes[component] = on_nodes
    missing = [component for component in COMPONENTS if component not in gpus]
    if missing:
        raise UserError(f"cluster.component_placement: no place for {', '.join(missing)}; add for example 'env: cpu'")
    return Placement(gpus["env"], gpus["rollout"], gpus["actor"], gpus_per_node, nodes)


def fitting(gpus: int) -> str:
    """Placements that fit on so many GPUs, as somebody would write them."""
    if gpus == 0:
        return "'env,rollout,actor: cpu'"
    if gpus == 1:
        return "'env: cpu' with 'rollout,actor: 0'"
    half, last = gpus // 2, gpus - 1
    first = "0" if half == 1 else f"0-{half - 1}"
    rest = f"{half}" if half == last else f"{half}-{last}"
    return f"'env,rollout,actor: all', or 'env: {first}' with 'rollout: {rest}' and 'actor: 0-{last}'"


def _places(value: Any, gpus_per_node: tuple[int, ...], where: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(GPUs, nodes) of one entry; both empty for ``cpu``."""
    if isinstance(value, Mapping):
        if set(value) != {"node_group", "placement"} or value["node_group"] != "node":
            raise UserError(
                f"{where}: {dict(value)} is not a placement; expected {{node_group: node, placement: 0-1}}, or GPUs as "
                "in 0-3"
            )
        return (), _indices(str(value["placement"]), len(gpus_per_node), "node", where, "raise cluster.num_nodes")
    text = str(value).strip()
    if text == "cpu":
        return (), ()
    return _indices(text, sum(gpus_per_node), "GPU", where, f"would fit: {fitting(sum(gpus_per_node))}"), ()


def _indices(text: str, available: int, what: str, where: str, advice: str) -> tuple[int, ...]:
    """``all`` -> every one there is, ``0-3`` or ``0,2,4-5`` -> those."""
    if text == "all":
        indices = list(range(available))
    else:
        indices = [index for part in text.split(",") for index in _range(part, text, where)]
    if not indices or max(indices) >= available:
        has = f"{what}s 0-{available - 1}" if available > 1 else f"{what} 0 alone" if available else f"no {what}"
        raise UserError(f"{where}: {text} asked for, this cluster has {has}; {advice}")
    if len(set(indices)) < len(indices):
        raise UserError(f"{where}: {text} names a {what} twice")
    return tuple(indices)


def _range(part: str, text: str, where: str) -> range:
    if ":" in part:
        raise UserError(
            f"{where}: {text!r} gives processes per GPU; rollout and actor have one each, simulators as many as "
            "env.train.workers says: leave out what follows the colon"
        )
    first, dash, last = part.strip().partition("-")
    if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
        raise UserError(f"{where}: {text!r} is not a placement; expected cpu, all, 3, 0-3 or 0,2,4-5")
    return range(int(first), int(last or first) + 1)
