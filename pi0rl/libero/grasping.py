"""Where to grip an object: by its whole width from above, or by a wall, a rim or a handle with room for the fingers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pi0rl.libero.skills import MAX_OPENING, Destination, Grasp, turned
from pi0rl.libero.world import OPEN_FINGER, World

YAWS = np.deg2rad([0, 15, -15, 30, -30, 45, -45, 60, -60, 75, -75, 90])
SPARE_OPENING = 0.008  # m that must be left between the open fingers and the object
GRIP_BELOW_TOP = 0.010  # m; further down, an opening finger can catch under the roof of a carton
GRIP_ABOVE_FLOOR = 0.008  # m; lower, the finger tips touch the floor
PART_BELOW_TOP = (0.012, 0.006)  # m from the top of a wall to the grip point
PART_DEPTH = 0.03  # m below the top of an object within which its parts can be gripped
ENOUGH_ROOM = 0.012  # m of distance to everything beyond which more does not make a grasp better
CLOSING = (0.004, 0.014, 0.027)  # m from the middle to the finger pads, where nothing else may be between them
SHALLOW_COST = 0.003  # m of room that a firmer hold is worth
DESCENT = (0.0, 0.04, 0.08, 0.12)  # m above the grip point where the gripper has to fit as well
LEAST_ROOM, BLOCKED_COST = 0.002, 1.0  # m; with less room a grasp comes after all that have it
DIFFERENT_GRASPS = 6  # tried one after the other
YAW_COST, LEVER_COST = 0.006, 0.05  # m of room that a turn of 1 rad, and a metre from the object's middle, are worth


@dataclass(frozen=True)
class Part:
    """A place to grip: grip point [3], turn of the gripper, distance from the object's middle, whether near the top."""

    grip: np.ndarray
    yaw: float
    lever: float
    shallow: bool


def choose_grasp(world: World, body: int, attempt: int, to: Destination) -> Grasp | None:
    """A grasp of an object that is to go somewhere; later attempts take other grasps. None if it is too big to grip.

    The whole object between the fingers where it fits, else one of its parts.
    """
    least = float(world.points(body)[:, 2].max()) + 0.02
    whole = _whole_grasp(world, body, attempt)
    found = whole or _part_grasp(world, body, attempt, to)
    if found is None:
        return None
    grip, yaw = found
    clear = _clear_height(world, body, grip, least)
    if whole is not None and clear == least:
        return Grasp(grip - world.position(body), yaw, clear)
    return Grasp(grip - world.position(body), yaw, clear, max(clear, float(world.grip_point()[2])) + 0.03)


def _whole_grasp(world: World, body: int, attempt: int) -> tuple[np.ndarray, float] | None:
    """Across the middle of the object, with the smallest turn for which the open fingers pass around it."""
    points = world.points(body)
    low, high = points.min(axis=0), points.max(axis=0)
    widths = [float(np.ptp(points[:, :2] @ np.array([-np.sin(yaw), np.cos(yaw)]))) for yaw in YAWS]
    fitting = [yaw for yaw, width in zip(YAWS, widths, strict=True) if width < MAX_OPENING - SPARE_OPENING]
    if not fitting:
        return None
    height = max(low[2] + GRIP_ABOVE_FLOOR, high[2] - GRIP_BELOW_TOP)
    return np.array([*(low + high)[:2] / 2, height]), float(fitting[attempt % len(fitting)])


def _part_grasp(world: World, body: int, attempt: int, to: Destination) -> tuple[np.ndarray, float] | None:
    """The part with the most room for the gripper where the object is and where it goes, at little turning."""
    points, own = world.points(body), world.geoms(body)
    shift = np.array([*(to.centre - world.position(body)[:2]), to.floor - points[:, 2].min()])

    def cost(part: Part) -> float:
        return YAW_COST * abs(part.yaw) + LEVER_COST * part.lever + (SHALLOW_COST if part.shallow else 0.0)

    found = sorted(parts(world, body), key=cost)
    if not found:
        return None
    wanted = attempt % min(len(found), DIFFERENT_GRASPS)
    rated: list[tuple[float, Part]] = []
    for part in found:
        # Distances are slow to compute; the rest cannot be better than this.
        if len(rated) > wanted and rated[wanted][0] >= ENOUGH_ROOM - cost(part):
            break
        room = _room(world, part, shift, own)
        worth = min(room, ENOUGH_ROOM) - cost(part) - (BLOCKED_COST if room < LEAST_ROOM else 0.0)
        rated.append((worth, part))
        rated.sort(key=lambda entry: -entry[0])
    return rated[wanted][1].grip, rated[wanted][1].yaw


def _room(world: World, part: Part, shift: np.ndarray, own: list[int]) -> float:
    """Distance of the gripper to everything else: on the way down, while it closes, and on arrival (m)."""
    rotation = turned(part.yaw)
    checks: list[tuple[np.ndarray, Sequence[int], float]] = [(part.grip, own, spread) for spread in CLOSING]
    for place, ignored in ((part.grip, ()), (part.grip + shift, own)):
        checks += [(place + np.array([0.0, 0.0, lift]), ignored, OPEN_FINGER) for lift in DESCENT]
    room = np.inf
    for place, ignored, spread in checks:
        room = min(room, world.clearance(place, rotation, ignored, spread))
        if room < LEAST_ROOM:
            break
    return room


def parts(world: World, body: int) -> list[Part]:
    """All narrow collision boxes near the top of an object, to be gripped across."""
    points = world.points(body)
    low, high = points.min(axis=0), points.max(axis=0)
    found = []
    for geom in world.geoms(body):
        centre, axes, half = world.box(geom)
        reach = half @ np.abs(axes).T  # half extents along the world's axes
        if centre[2] + reach[2] < high[2] - PART_DEPTH:
            continue
        for narrow in range(3):
            across = axes[:2, narrow]
            if np.linalg.norm(across) < 0.7 or half[narrow] > 1.3 * half.min():
                continue
            across = across / np.linalg.norm(across)
            if 2 * half @ np.abs(across @ axes[:2]) > MAX_OPENING - SPARE_OPENING:
                continue
            upright = int(np.argmax(np.abs(axes[2])))
            yaw = np.arctan2(-across[0], across[1])  # the fingers open along (-sin yaw, cos yaw)
            yaw = float((yaw + np.pi / 2) % np.pi - np.pi / 2)
            for depth in PART_BELOW_TOP:
                height = max(low[2] + GRIP_ABOVE_FLOOR, centre[2] + reach[2] - depth)
                along = np.clip((height - centre[2]) / axes[2, upright], -half[upright], half[upright])
                grip = np.array([*(centre + along * axes[:, upright])[:2], height])
                lever = float(np.linalg.norm(grip[:2] - (low + high)[:2] / 2))
                found.append(Part(grip, yaw, lever, depth == min(PART_BELOW_TOP)))
    return found


def _clear_height(world: World, body: int, grip: np.ndarray, least: float) -> float:
    """Height above which the gripper may move sideways on its way to a grip point without touching other things.

    The way in is a funnel that rises by 1.5 m per metre from the grip point; what stands higher than it, under the
    fingers or under the wider hand, lifts the funnel.
    """
    points = world.surface(ignore=[world.root(body)])
    if not len(points):
        return least
    way = world.grip_point()[:2] - grip[:2]
    share = np.clip((points[:, :2] - grip[:2]) @ way / max(float(way @ way), 1e-9), 0.0, 1.0)
    lateral = np.linalg.norm(points[:, :2] - grip[:2] - share[:, None] * way, axis=1)
    relief = 1.5 * np.maximum(0.0, np.linalg.norm(points[:, :2] - grip[:2], axis=1) - 0.014)
    fingers = np.max(np.where(lateral < 0.03, points[:, 2] + 0.02 - relief, -np.inf))
    hand = np.max(np.where(lateral < 0.11, points[:, 2] - 0.015 - relief, -np.inf))
    return float(max(least, fingers, hand))
