"""What kind of failure an episode was, judged from where its objects and the gripper went."""

from __future__ import annotations

from typing import Literal

import mujoco
import numpy as np

from pi0rl.libero.goal import JointTest, OnObject
from pi0rl.libero.simulation import Simulation

FailureKind = Literal["never grasped", "wrong object", "dropped", "timeout"]

# An object this much above where it lay (m), with the gripper this close to its origin (m), is in the gripper: the
# origins of LIBERO's largest objects are about 12 cm from where they are grasped.
LIFTED, NEAR = 0.02, 0.15


class ObjectTrace:
    """Which objects the gripper held at each control step of an episode; begins where the simulation stands."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        model = simulation.model
        self._bodies = model.jnt_bodyid[model.jnt_type == mujoco.mjtJoint.mjJNT_FREE]
        self._rest = self._positions()[:, 2]
        self._held: list[np.ndarray] = []

    def record(self) -> None:
        """Note the present step."""
        positions = self._positions()
        distance = np.linalg.norm(positions - self._simulation.state()[:3], axis=1)
        self._held.append((positions[:, 2] > self._rest + LIFTED) & (distance < NEAR))

    def failure(self) -> FailureKind:
        """The kind, if the episode ends here without success."""
        held = np.array(self._held).reshape(-1, len(self._bodies))
        return failure_kind(held, *self._targets())

    def _positions(self) -> np.ndarray:
        return self._simulation.data.xpos[self._bodies]

    def _targets(self) -> tuple[np.ndarray, np.ndarray]:
        """Which objects the goal is about, and which of them are not where it wants them."""
        wanted, missing = np.zeros(len(self._bodies), bool), np.zeros(len(self._bodies), bool)
        for test in self._simulation.goal:
            if isinstance(test, JointTest):
                continue
            objects = self._bodies == (test.upper_body if isinstance(test, OnObject) else test.body)
            wanted |= objects
            if not test.holds(self._simulation.model, self._simulation.data):
                missing |= objects
        return wanted, missing


def failure_kind(held: np.ndarray, wanted: np.ndarray, missing: np.ndarray) -> FailureKind:
    """Classify a failed episode.

    Args:
        held: bool [T, n], which of n objects the gripper held at each of T steps.
        wanted: bool [n], the goal is about the object.
        missing: bool [n], and the object is not where it should be at the end.

    Returns:
        ``timeout`` if a missing object is still held at the end, or only doors, drawers and knobs remain;
        ``dropped`` if a missing object was held before; ``wrong object`` if only objects outside the goal were held;
        else ``never grasped``.
    """
    if not missing.any() or (len(held) and held[-1, missing].any()):
        return "timeout"
    if held[:, missing].any():
        return "dropped"
    return "wrong object" if held[:, ~wanted].any() else "never grasped"
