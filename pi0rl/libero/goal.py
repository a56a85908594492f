"""LIBERO's goal predicates, evaluated on a `MjData` without LIBERO.

A goal is a conjunction of tests. Each test holds plain indices into the physics-only model, so it can be stored as JSON
beside the model, and repeats the arithmetic of LIBERO's predicate with numpy: same operations, same order, same bits.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import mujoco
import numpy as np


@dataclass(frozen=True)
class JointTest:
    """`Open`, `Close`, `Turnon`, `Turnoff`: joint positions against a threshold.

    Attributes:
        qpos: Addresses in qpos.
        threshold: Bound in rad or m.
        above: True if positions above the threshold pass, False if those below do.
        inclusive: Whether the threshold itself passes.
        every: True if all joints must pass, False if one is enough.
    """

    qpos: tuple[int, ...]
    threshold: float
    above: bool
    inclusive: bool
    every: bool

    def holds(self, model: mujoco.MjModel, data: mujoco.MjData) -> bool:
        passed = (self._passes(data.qpos[address]) for address in self.qpos)
        return all(passed) if self.every else any(passed)

    def _passes(self, position: float) -> bool:
        if position == self.threshold:
            return self.inclusive
        return bool(position > self.threshold) is self.above and position == position


@dataclass(frozen=True)
class InSite:
    """`In(object, region)`: the object's origin lies in the region's box, which may reach 1 cm lower."""

    site: int
    size: tuple[float, float, float]
    body: int

    def holds(self, model: mujoco.MjModel, data: mujoco.MjData) -> bool:
        centre = data.site_xpos[self.site]
        half_size = half_extents(data, self)
        upper = centre + half_size
        lower = centre - half_size
        lower[2] -= 0.01
        position = data.xpos[self.body]
        return bool(np.all(position > lower) and np.all(position < upper))


@dataclass(frozen=True)
class OnSite:
    """`On(object, region)`: the object's origin is within 10 cm above the region and, if the region belongs to a
    body, the two touch (`owner_geoms` is empty for a zone on the table or the floor)."""

    site: int
    size: tuple[float, float, float]
    body: int
    owner_geoms: tuple[int, ...]
    object_geoms: tuple[int, ...]

    def holds(self, model: mujoco.MjModel, data: mujoco.MjData) -> bool:
        size = np.array(self.size)
        delta = data.site_xmat[self.site].reshape(3, 3) @ (data.xpos[self.body] - data.site_xpos[self.site])
        above = size[2] - 0.005 < delta[2] < size[2] + 0.10 and np.all(np.abs(delta[:2]) < size[:2])
        return bool(above) and (not self.owner_geoms or _touching(data, self.owner_geoms, self.object_geoms))


@dataclass(frozen=True)
class OnObject:
    """`On(object, object)`: not below, closer than 3 cm in the plane, and touching."""

    lower_body: int
    upper_body: int
    lower_geoms: tuple[int, ...]
    upper_geoms: tuple[int, ...]

    def holds(self, model: mujoco.MjModel, data: mujoco.MjData) -> bool:
        lower, upper = data.xpos[self.lower_body], data.xpos[self.upper_body]
        near = lower[2] <= upper[2] and np.linalg.norm(lower[:2] - upper[:2]) < 0.03
        return bool(near) and _touching(data, self.lower_geoms, self.upper_geoms)


def half_extents(data: mujoco.MjData, test: InSite | OnSite) -> np.ndarray:
    """Half the size of a region along the world's axes, float64 [3] (m)."""
    return np.abs(data.site_xmat[test.site].reshape(3, 3) @ np.array(test.size))


GoalTest = JointTest | InSite | OnSite | OnObject
_TESTS = {test.__name__: test for test in (JointTest, InSite, OnSite, OnObject)}


def goal_reached(goal: tuple[GoalTest, ...], model: mujoco.MjModel, data: mujoco.MjData) -> bool:
    """Whether every test holds. Like LIBERO, reads poses and contacts as the last physics step left them."""
    return all(test.holds(model, data) for test in goal)


def goal_to_json(goal: tuple[GoalTest, ...]) -> list[dict[str, Any]]:
    return [{"test": type(test).__name__, **asdict(test)} for test in goal]


def goal_from_json(entries: list[dict[str, Any]]) -> tuple[GoalTest, ...]:
    return tuple(test_from_json(entry) for entry in entries)


def test_from_json(entry: dict[str, Any]) -> GoalTest:
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in entry.items() if key != "test"
    }
    return _TESTS[entry["test"]](**fields)


def _touching(data: mujoco.MjData, first: tuple[int, ...], second: tuple[int, ...]) -> bool:
    for one, other in data.contact.geom[: data.ncon].tolist():
        if (one in first and other in second) or (other in first and one in second):
            return True
    return False
