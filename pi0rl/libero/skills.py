"""The expert's skills: closed-loop motions of the gripper, as generators of one action per control step.

Every skill is a function of what a camera could see (gripper pose, finger width, object poses), not of a clock: the
height to aim at follows from the horizontal distance that is left. So the same scene gives the same action in every
episode, which is what makes the demonstrations easy to imitate, and a disturbed episode comes back by itself. Only a
grasp that comes in low also asks how fast the arm is moving.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mujoco
import numpy as np

from pi0rl.libero.world import World

OPEN, CLOSED = -1.0, 1.0
MAX_OPENING = 0.08  # m between the finger pads
POSITION_SCALE, ROTATION_SCALE = 0.05, 0.5  # what an action of 1 asks of the controller, in m and rad
POSITION_GAIN, ROTATION_GAIN = 2.0, 0.75
HAND_CLEARANCE = 0.03  # m between the finger tips of a travelling gripper and what is under it
TIP = 0.010  # m from the grip point to the ends of the fingers
PRESSING_STEP, PUSHING_STEP = (0.016, 0.009), (0.022, 0.0)  # m ahead and below to aim at when dragging
LOW_WALL = 0.02  # m; fingers slip over a lower one
OVERRUN, LOW_GAIN = 2.0, 1.5  # control steps by which the arm overruns; how much harder than usual it then brakes
STALL_STEPS = 8  # control steps without progress after which a motion is left
DOWNWARD = np.diag([1.0, -1.0, -1.0])  # the gripper looking down, its fingers opening along the world's y axis


@dataclass(frozen=True)
class Grasp:
    """A top grasp: where the grip point goes and how the gripper is turned about the vertical.

    Attributes:
        offset: float64 [3], from the object's body frame origin to the grip point, in world axes (m).
        yaw: turn about the world's z axis away from fingers opening along y (rad).
        clear_height: height above which the open fingers may move sideways over the object (m, world z).
        ceiling: height that the way there need not exceed (m, world z).
    """

    offset: np.ndarray
    yaw: float
    clear_height: float
    ceiling: float = np.inf


@dataclass(frozen=True)
class Destination:
    """Where an object is to go.

    Attributes:
        centre: float64 [2], where the origin of its frame is to be.
        rim: height its lowest point must pass over to get there.
        floor: height at which to let go.
        support: body to let go on as soon as they touch, if any.
        turn: how far it is to be turned about the vertical on the way (rad).
    """

    centre: np.ndarray
    rim: float
    floor: float
    support: int | None = None
    turn: float = 0.0


def steer(world: World, target: np.ndarray, yaw: float, gripper: float) -> np.ndarray:
    """One action towards a grip point and a turn of the gripper that looks down."""
    return steer_to(world, target, turned(yaw), gripper)


def turned(yaw: float) -> np.ndarray:
    """Orientation [3, 3] of the gripper that looks down, turned about the vertical."""
    return turn_about_vertical(yaw) @ DOWNWARD


def steer_to(world: World, target: np.ndarray, wanted: np.ndarray, gripper: float) -> np.ndarray:
    """One action towards a pose of the gripper: proportional, straight, at most 1 in every number."""
    push = POSITION_GAIN * (target - world.grip_point()) / POSITION_SCALE
    push /= max(1.0, float(np.abs(push).max()))
    turn = ROTATION_GAIN * _rotation_vector(wanted @ world.grip_rotation().T) / ROTATION_SCALE
    turn /= max(1.0, float(np.abs(turn).max()))
    return np.concatenate([push, turn, [gripper]])


def turned_least(world: World, rotation: np.ndarray) -> np.ndarray:
    """The orientation or the one with the fingers swapped, whichever is the nearer to the gripper's."""
    swapped = rotation * np.array([-1.0, -1.0, 1.0])
    now = world.grip_rotation()
    return max(rotation, swapped, key=lambda wanted: float(np.trace(wanted @ now.T)))


def ramp(value: float, low: float, high: float) -> float:
    """0 below ``low``, 1 above ``high``, linear between."""
    return float(np.clip((value - low) / (high - low), 0.0, 1.0))


def grasp(world: World, body: int, choice: Grasp) -> Iterator[np.ndarray]:
    """Come down on an object from above, fingers open, and close them on it."""
    progress, last = Progress(), world.grip_point()
    low = np.isfinite(choice.ceiling)
    while True:
        target = world.position(body) + choice.offset
        here = world.grip_point()
        sideways = float(np.linalg.norm(target[:2] - here[:2]))
        if sideways < 0.006 and here[2] - target[2] < 0.006:
            break
        if progress.stalled(float(np.linalg.norm(target - here))):
            break
        goal = target.copy()
        if low:
            # There is no long way down on which to come to rest: brake, and come down where the arm will have stopped.
            stops = here[:2] + OVERRUN * (here - last)[:2]
            sideways = max(sideways, float(np.linalg.norm(target[:2] - stops)))
            goal[:2] = here[:2] + LOW_GAIN * (target[:2] - stops)
        # A funnel: over the object the height falls with the horizontal distance, down to the grasp when it is gone.
        goal[2] += (choice.clear_height - target[2]) * ramp(sideways, 0.004, 0.014) + 1.5 * max(0.0, sideways - 0.014)
        goal[2] = min(goal[2], choice.ceiling)
        last = here
        yield steer(world, goal, choice.yaw, OPEN)
    yield from squeeze(world, choice.yaw)


def squeeze(world: World, yaw: float) -> Iterator[np.ndarray]:
    """Close the fingers where they are, the gripper looking down."""
    yield from squeeze_at(world, turned(yaw))


def squeeze_at(world: World, rotation: np.ndarray) -> Iterator[np.ndarray]:
    """Close the fingers where they are, and wait until their width no longer changes (8 to 10 steps)."""
    hold = world.grip_point()
    width, still = world.finger_width(), 0
    for step in range(16):
        yield steer_to(world, hold, rotation, CLOSED)
        change, width = abs(world.finger_width() - width), world.finger_width()
        still = still + 1 if change < 5e-4 else 0
        if step >= 4 and still >= 2:
            return


def carry(world: World, body: int, to: Destination, yaw: float) -> Iterator[np.ndarray]:
    """Lift a held object, bring it over its destination and lower it to a centimetre or two above its place.

    Ends early when the object is lost on the way (the caller looks, and grasps again).
    """
    progress = Progress()
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
        if to.support is not None and distance < 0.02 and world.touching(body, to.support):
            return
        if progress.stalled(distance + abs(height - bottom)):
            return
        # Sideways only as far as the object is up: first straight up, then over, without a corner between.
        free = ramp(bottom, to.rim - 0.06, to.rim - 0.01) if distance > 0.025 else 1.0
        goal = here + np.array([*(free * sideways), height - bottom])
        yield steer(world, goal, yaw + to.turn * ramp(bottom, to.rim - 0.06, to.rim - 0.01), CLOSED)


def release(world: World, yaw: float, steps: int) -> Iterator[np.ndarray]:
    """Open the fingers in place and wait, the gripper looking down."""
    yield from hold(world, turned(yaw), OPEN, steps)


def hold(world: World, rotation: np.ndarray, gripper: float, steps: int) -> Iterator[np.ndarray]:
    """Stay in place for some steps."""
    place = world.grip_point()
    for _ in range(steps):
        yield steer_to(world, place, rotation, gripper)


def rise(world: World, height: float, yaw: float) -> Iterator[np.ndarray]:
    """Go straight up to a height with open fingers."""
    target = np.array([*world.grip_point()[:2], height])
    for _ in range(40):
        if height - world.grip_point()[2] < 0.02:
            return
        yield steer(world, target, yaw, OPEN)


def reach(
    world: World, grip: np.ndarray, rotation: np.ndarray, gripper: float, near: float = 0.008
) -> Iterator[np.ndarray]:
    """Go straight to a pose; ends within ``near`` metres of it, or when the arm gets no further."""
    progress = Progress()
    while True:
        away = float(np.linalg.norm(grip - world.grip_point()))
        askew = float(np.linalg.norm(_rotation_vector(rotation @ world.grip_rotation().T)))
        if (away < near and askew < 0.15) or progress.stalled(away + 0.1 * askew):
            return
        yield steer_to(world, grip, rotation, gripper)


def travel(
    world: World, grip: np.ndarray, rotation: np.ndarray, gripper: float, near: float = 0.012, below: float = 0.0
) -> Iterator[np.ndarray]:
    """Go to a pose over everything that stands between: up, across while turning, and down; ``below`` is how far what
    the gripper holds reaches below the grip point (m)."""
    held = world.held_bodies() if gripper == CLOSED else ()
    between = world.highest_between(world.grip_point()[:2], grip[:2], 0.1, held)
    over = max(float(grip[2]), between + HAND_CLEARANCE + below)
    progress = Progress()
    while True:
        here = world.grip_point()
        sideways = float(np.linalg.norm(grip[:2] - here[:2]))
        askew = float(np.linalg.norm(_rotation_vector(rotation @ world.grip_rotation().T)))
        far = sideways > 0.04
        height = abs(over - here[2]) + over - grip[2] if far else abs(grip[2] - here[2])
        if (sideways < near and height < near and askew < 0.15) or progress.stalled(
            2 * sideways + height + 0.1 * askew
        ):
            return
        goal = grip.copy()
        goal[2] += (over - grip[2]) * ramp(sideways, 0.01, 0.04)
        if far:
            free = ramp(here[2], over - 0.06, over - 0.01)
            goal[:2] = here[:2] + free * (grip[:2] - here[:2])
        yield steer_to(world, goal, rotation, gripper)


def drag(world: World, body: int, centre: np.ndarray) -> Iterator[np.ndarray]:
    """Pull an open object over the table with closed fingers inside it, until it is at a place.

    The fingers stand ahead of its middle, so that it trails behind and keeps its heading. They push against its wall,
    or press on its floor where it has hardly any.
    """
    points, floor = world.points(body), world.inner_floor(body)
    way = centre - world.position(body)[:2]
    ahead = np.array([*way / np.linalg.norm(way), 0.0])
    radius = float(np.max((points - world.position(body)) @ ahead))
    presses = points[:, 2].max() - floor < LOW_WALL
    height, step = (TIP, PRESSING_STEP) if presses else (2 * TIP, PUSHING_STEP)
    inside = np.array([*world.position(body)[:2], floor + height]) + 0.3 * radius * ahead
    rotation = turned(0.0)
    yield from travel(world, inside + np.array([0.0, 0.0, 0.05]), rotation, CLOSED, near=0.02)
    yield from reach(world, inside, rotation, CLOSED, near=0.005)
    progress, distance = Progress(), float(np.linalg.norm(way))
    while float((centre - world.position(body)[:2]) @ ahead[:2]) > 0.004:
        along = float((world.grip_point() - inside) @ ahead)
        if along > distance + radius or progress.stalled(-along):
            break
        yield steer_to(world, inside + ahead * (along + step[0]) - np.array([0.0, 0.0, step[1]]), rotation, CLOSED)
    yield from rise(world, float(points[:, 2].max()) + 0.08, 0.0)


class Progress:
    """Notices when a distance has not become smaller for a while."""

    def __init__(self) -> None:
        self._best, self._since = np.inf, 0

    def stalled(self, distance: float) -> bool:
        if distance < self._best - 0.002:
            self._best, self._since = distance, 0
        else:
            self._since += 1
        return self._since >= STALL_STEPS


def turn_about_vertical(yaw: float) -> np.ndarray:
    """Rotation matrix [3, 3] about the world's z axis."""
    cosine, sine = np.cos(yaw), np.sin(yaw)
    return np.array([[cosine, -sine, 0.0], [sine, cosine, 0.0], [0.0, 0.0, 1.0]])


def _rotation_vector(rotation: np.ndarray) -> np.ndarray:
    quaternion, vector = np.empty(4), np.empty(3)
    mujoco.mju_mat2Quat(quaternion, rotation.flatten())
    mujoco.mju_quat2Vel(vector, quaternion, 1.0)
    return vector
