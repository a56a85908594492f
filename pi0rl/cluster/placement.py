"""``cluster.component_placement`` -> which GPUs (or the CPU) each component runs on.

The published forms: ``env: 0-3``, ``rollout: 4-7``, ``actor: 0-7`` (ranges), ``env,rollout,actor: all`` (shared), and
``cpu`` for a machine without GPUs. How many GPUs a component gets is honoured, which of them is up to Ray; env workers
run on cores.
"""

from __future__ import annotations

from dataclasses import dataclass

from pi0rl.errors import UserError
from pi0rl.params import ClusterParams

COMPONENTS = ("env", "rollout", "actor")


@dataclass(frozen=True)
class Placement:
    """GPU indices per component; an empty tuple means the CPU."""

    env: tuple[int, ...]
    rollout: tuple[int, ...]
    actor: tuple[int, ...]

    @property
    def gpus(self) -> tuple[int, ...]:
        """Every GPU that some component uses."""
        return tuple(sorted({*self.env, *self.rollout, *self.actor}))

    def sharers(self, gpu: int) -> int:
        """How many torch components (rollout, actor) share ``gpu``."""
        return (gpu in self.rollout) + (gpu in self.actor)


def resolve_placement(cluster: ClusterParams, available_gpus: int) -> Placement:
    """Read ``cluster.component_placement`` for a machine with ``available_gpus`` GPUs.

    Raises:
        UserError: an unknown or missing component, a malformed range, or a GPU that does not exist.
    """
    devices: dict[str, tuple[int, ...]] = {}
    for key, value in cluster.component_placement.items():
        for component in (part.strip() for part in key.split(",")):
            where = f"cluster.component_placement.{component}"
            if component not in COMPONENTS:
                raise UserError(f"{where}: unknown component; expected {', '.join(COMPONENTS)}")
            if component in devices:
                raise UserError(f"{where}: placed twice; name each component once")
            devices[component] = _devices(str(value), available_gpus, where)
    missing = [component for component in COMPONENTS if component not in devices]
    if missing:
        raise UserError(f"cluster.component_placement: no place for {', '.join(missing)}; add for example 'env: cpu'")
    if len(devices["actor"]) > 1:
        raise UserError(
            f"cluster.component_placement.actor: {len(devices['actor'])} GPUs, but the update runs in one process; "
            "expected one GPU, for example 'actor: 0' (rollout may use the others)"
        )
    return Placement(**devices)


def _devices(text: str, available: int, where: str) -> tuple[int, ...]:
    """``cpu`` -> (), ``all`` -> every GPU, ``0-3`` or ``0,2,4-5`` -> those."""
    text = text.strip()
    if text == "cpu":
        return ()
    if text == "all":
        indices = list(range(available))
    else:
        indices = [index for part in text.split(",") for index in _range(part, text, where)]
    if not indices or max(indices) >= available:
        has = f"GPUs 0-{available - 1}" if available else "no GPU"
        raise UserError(f"{where}: {text} asked for, this cluster has {has}; use what exists, or cpu")
    if len(set(indices)) < len(indices):
        raise UserError(f"{where}: {text} names a GPU twice")
    return tuple(indices)


def _range(part: str, text: str, where: str) -> range:
    first, dash, last = part.strip().partition("-")
    if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
        raise UserError(f"{where}: {text!r} is not a placement; expected cpu, all, 3, 0-3 or 0,2,4-5")
    return range(int(first), int(last or first) + 1)
