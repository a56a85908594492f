"""The expert's skills: closed-loop motions of the gripper, as generators of one action per control step.

Every skill is a function of what a camera could see (gripper pose, finger width, object poses), not of a clock: the
height to aim at follows from the horizontal distance that is left. So the same scene gives the same action in every
episode, which is what makes the demonstrations easy to imitate, and a disturbed episode comes back by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mujoco
import numpy as np

from pi0rl.libero.simulation import Simulation

OPEN, CLOSED = -1.0, 1.0
MAX_OPENING = 0.08  # m between the finger pads
POSITION_SCALE, ROTATION_SCALE = 0.05, 0.5  # what an action of 1 asks of the controller, in m and rad
POSITION_GAIN, ROTATION_GAIN = 2.0, 0.75
STALL_STEPS = 8  # control steps without progress after which a motion is left
DOWNWARD = np.diag([1.0, -1.0, -1.0])  # the gripper looking down, its fingers opening along the world's y axis


@dataclass(frozen=True)
class Grasp:
    """A top grasp: where the grip point goes and how the gripper is turned about the vertical.

    Attributes:
        offset: float64 [3], from the object's body frame origin to the grip point, in world axes (m).
        yaw: turn about the world's z axis away from fingers opening along y (rad).
        clear_height: height above which the open fingers may move sideways over the object (m, world z).
    """

    offset: np.ndarray
    yaw: float
    clear_height: float


@dataclass(frozen=True)
class Destination:
    """Where an object is to go: the horizontal centre, and the height its lowest point must pass over to get there."""

    centre: np.ndarray
    rim: float
    floor: float


class World:
    """Privileged view of a running simulation: the gripper, and the objects by the index of their root body."""

    def __init__(self, simulation: Simulation):
        self.simulation = simulation
        self._corners: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def grip_point(self) -> np.ndarray:
        """Position of the point between the finger tips, float64 [3] (m)."""
        return self.simulation.proprioception()["robot0_eef_pos"]

    def grip_rotation(self) -> np.ndarray:
        """Orientation of the hand as a rotation matrix; its second column is the fingers' opening axis."""
        x, y, z, w = self.simulation.proprioception()["robot0_eef_quat"]
        matrix = np.empty(9)
        mujoco.mju_quat2Mat(matrix, np.array([w, x, y, z]))
        return matrix.reshape(3, 3)

    def finger_width(self) -> float:
        """Distance of the two finger joints (m); 0.08 when open."""
        left, right = self.simulation.proprioception()["robot0_gripper_qpos"]
        return float(left - right)

    def position(self, body: int) -> np.ndarray:
        """Position of a body's frame (m); LIBERO's goal predicates look at nothing else of an object."""
        return self.simulation.data.xpos[body].copy()

    def points(self, body: int) -> np.ndarray:
        """Corners of the boxes around all collision geoms of an object, float64 [n, 3], world frame (m)."""
        if body not in self._corners:
            self._corners[body] = _collision_corners(self.simulation.model, body)
        owners, corners = self._corners[body]
        rotations = self.simulation.data.xmat[owners].reshape(-1, 3, 3)
        return self.simulation.data.xpos[owners] + np.einsum("nij,nj->ni", rotations, corners)


def _collision_corners(model: mujoco.MjModel, root: int) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the collision boxes of a body and its children: whose frame they are in [n], and where [n, 3]."""
    tree = {root}
    for body in range(root + 1, model.nbody):  # children come after their parents
        if model.body_parentid[body] in tree:
            tree.add(body)
    signs = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, 8).T
    owners, corners = [], []
    for geom in np.flatnonzero((model.geom_contype != 0) | (model.geom_conaffinity != 0)):
        if model.geom_bodyid[geom] not in tree:
            continue
        rotation = np.empty(9)
        mujoco.mju_quat2Mat(rotation, model.geom_quat[geom])
        box = model.geom_aabb[geom, :3] + signs * model.geom_aabb[geom, 3:]
        corners.append(model.geom_pos[geom] + box @ rotation.reshape(3, 3).T)
        owners.append(np.full(8, model.geom_bodyid[geom]))
    return np.concatenate(owners), np.concatenate(corners)


def steer(world: World, target: np.ndarray, yaw: float, gripper: float) -> np.ndarray:
    """One action towards a grip point and a turn of the gripper: proportional, straight, at most 1 in every number."""
    push = POSITION_GAIN * (target - world.grip_point()) / POSITION_SCALE
    push /= max(1.0, float(np.abs(push).max()))
    wanted = _turn(yaw) @ DOWNWARD
    turn = ROTATION_GAIN * _rotation_vector(wanted @ world.grip_rotation().T) / ROTATION_SCALE
    turn /= max(1.0, float(np.abs(turn).max()))
    return np.concatenate([push, turn, [gripper]])


def ramp(value: float, low: float, high: float) -> float:
    """0 below ``low``, 1 above ``high``, linear between."""
    return float(np.clip((value - low) / (high - low), 0.0, 1.0))


def grasp(world: World, body: int, choice: Grasp) -> Iterator[np.ndarray]:
    """Come down on an object from above, fingers open, and close them on it."""
    progress = _Progress()
    while True:
        target = world.position(body) + choice.offset
        here = world.grip_point()
        sideways = float(np.linalg.norm(target[:2] - here[:2]))
        if sideways < 0.006 and here[2] - target[2] < 0.006:
            break
        if progress.stalled(float(np.linalg.norm(target - here))):
            break
        # A funnel: over the object the height falls with the horizontal distance, down to the grasp when it is gone.
        goal = target.copy()
        goal[2] += (choice.clear_height - target[2]) * ramp(sideways, 0.004, 0.014) + 1.5 * max(0.0, sideways - 0.014)
        yield steer(world, goal, choice.yaw, OPEN)
    yield from squeeze(world, choice.yaw)


def squeeze(world: World, yaw: float) -> Iterator[np.ndarray]:
    """Close the fingers where they are, and wait until their width no longer changes (8 to 10 steps)."""
    hold = world.grip_point()
    width, still = world.finger_width(), 0
    for step in range(16):
        yield steer(world, hold, yaw, CLOSED)
        change, width = abs(world.finger_width() - width), world.finger_width()
        still = still + 1 if change < 5e-4 else 0
        if step >= 4 and still >= 2:
            return


def carry(world: World, body: int, to: Destination, yaw: float) -> Iterator[np.ndarray]:
    """Lift a held object, bring it over its destination and lower it to a centimetre or two above its place.

    Ends early when the object is lost on the way (the caller looks, and grasps again).
    """
    progress = _Progress()
    start = world.grip_point()[2] - float(world.points(body)[:, 2].min())
    while True:
        here, points = world.grip_point(), world.points(body)
        bottom = float(points[:, 2].min())
        if here[2] - bottom > start + 0.04:
            return
        sideways = to.centre - world.position(body)[:2]
        distance = float(np.linalg.norm(sideways))
        height = to.floor + (to.rim - to.floor) * ramp(distance, 0.008, 0.025)
        if distance < 0.015 and bottom - to.floor < 0.006:
            return
        if progress.stalled(distance + abs(height - bottom)):
            return
        # Sideways only as far as the object is up: first straight up, then over, without a corner between.
        free = ramp(bottom, to.rim - 0.06, to.rim - 0.01) if distance > 0.025 else 1.0
        goal = here + np.array([*(free * sideways), height - bottom])
        yield steer(world, goal, yaw, CLOSED)


def release(world: World, yaw: float, steps: int) -> Iterator[np.ndarray]:
    """Open the fingers in place and wait."""
    hold = world.grip_point()
    for _ in range(steps):
        yield steer(world, hold, yaw, OPEN)


def rise(world: World, height: float, yaw: float) -> Iterator[np.ndarray]:
    """Go straight up to a height with open fingers."""
    target = np.array([*world.grip_point()[:2], height])
    for _ in range(40):
        if height - world.grip_point()[2] < 0.02:
            return
        yield steer(world, target, yaw, OPEN)


class _Progress:
    """Notices when a distance has not become smaller for a while."""

    def __init__(self) -> None:
        self._best, self._since = np.inf, 0

    def stalled(self, distance: float) -> bool:
        if distance < self._best - 0.002:
            self._best, self._since = distance, 0
        else:
            self._since += 1
        return self._since >= STALL_STEPS


def _turn(yaw: float) -> np.ndarray:
    cosine, sine = np.cos(yaw), np.sin(yaw)
    return np.array([[cosine, -sine, 0.0], [sine, cosine, 0.0], [0.0, 0.0, 1.0]])


def _rotation_vector(rotation: np.ndarray) -> np.ndarray:
    quaternion, vector = np.empty(4), np.empty(3)
    mujoco.mju_mat2Quat(quaternion, rotation.flatten())
    mujoco.mju_quat2Vel(vector, quaternion, 1.0)
    return vector
