"""Putting an object under a roof, into a microwave or on a shelf: gripped and brought in from the side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from pi0rl.libero import skills
from pi0rl.libero.goal import InSite, half_extents
from pi0rl.libero.grasping import LEAST_ROOM, SPARE_OPENING
from pi0rl.libero.skills import CLOSED, MAX_OPENING, OPEN, turn_about_vertical
from pi0rl.libero.world import World

UP = np.array([0.0, 0.0, 1.0])
DIRECTIONS = tuple(np.array(d) for d in ([0.0, 1.0, 0.0], [0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]))
LEANS = (0.0, 0.45, 0.8)  # rad below level at which the gripper may point
RETREATS = (0.0, 0.04, 0.08)  # m back from the grip point where the gripper has to fit as well
OUTSIDE = 0.2  # m from the middle of a region to where nothing is over it
GRIP_DEPTH = 0.012  # m from the near side of a part to the grip point
ABOVE_FLOOR = 0.015  # m at which an object comes in
LIFT = 0.05  # m
EDGE = 0.012  # m inside its region that an object's origin has to be
BESIDE = 0.004  # m that must be free on either side of a part for the fingers to close on it
HAND_HALF = 0.036  # m, of the hand lying on its side


@dataclass(frozen=True)
class SideGrasp:
    """A grasp from the side.

    Attributes:
        grip: grip point [3].
        approach: unit vector [3] in which the fingers point, level or leaning down.
        turn: about the vertical on the way, after which they point into the region (rad).
        place: where the object's origin is to go [3].
    """

    grip: np.ndarray
    approach: np.ndarray
    turn: float
    place: np.ndarray


def way_in(world: World, test: InSite) -> np.ndarray | None:
    """The level direction from which a region under a roof can be entered; None for a region open at the top."""
    centre = world.data.site_xpos[test.site]
    half = half_extents(world.data, test)
    points = world.surface() - centre
    if not ((np.abs(points[:, :2]) < 0.03).all(axis=1) & (points[:, 2] > 0.6 * half[2])).any():
        return None
    level = points[np.abs(points[:, 2]) < half[2] - 0.02]
    for direction in DIRECTIONS:
        along = -level @ direction
        lateral = np.abs(level @ np.cross(UP, direction))
        if not ((along > 0.0) & (along < OUTSIDE) & (lateral < 0.04)).any():
            return direction
    return None


def insert(world: World, test: InSite, into: np.ndarray, attempt: int) -> Iterator[np.ndarray]:
    """Grip an object from the side, bring it in front of its region and straight in."""
    body = test.body
    options = side_grasps(world, test, into)
    if not options:
        return
    chosen = options[attempt % min(len(options), 4)]
    rotation = side_rotation(world, chosen.approach)
    yield from skills.travel(world, chosen.grip - 0.08 * chosen.approach, rotation, OPEN)
    yield from skills.reach(world, chosen.grip, rotation, OPEN)
    yield from skills.squeeze_at(world, rotation)
    yield from skills.reach(world, chosen.grip + LIFT * UP, rotation, CLOSED, near=0.015)
    if body not in world.held_bodies():
        yield from skills.hold(world, rotation, OPEN, 6)
        return
    turned = turn_about_vertical(chosen.turn) @ rotation
    below = float(world.grip_point()[2] - world.points(body)[:, 2].min())
    arm = turn_about_vertical(chosen.turn) @ (world.grip_point() - world.position(body))
    yield from skills.travel(world, chosen.place + arm - OUTSIDE * into, turned, CLOSED, below=below)
    arm = world.grip_point() - world.position(body)
    yield from skills.reach(world, chosen.place + arm, turned, CLOSED)
    yield from skills.hold(world, turned, OPEN, 10)
    yield from skills.reach(world, world.grip_point() - 0.15 * into, turned, OPEN)


def side_rotation(world: World, approach: np.ndarray) -> np.ndarray:
    """Orientation of the gripper pointing in a direction that is not straight down, its fingers opening sideways."""
    opening = np.cross(UP, approach)
    opening /= np.linalg.norm(opening)
    rotation = np.column_stack([np.cross(opening, approach), opening, approach])
    return skills.turned_least(world, rotation)


def side_grasps(world: World, test: InSite, into: np.ndarray) -> list[SideGrasp]:
    """Grasps from the side of an object's parts with room where it is and where it goes, the best first."""
    body = test.body
    low = float(world.points(body)[:, 2].min())
    rated = []
    for geom in world.geoms(body):
        centre, axes, half = world.box(geom)
        for narrow in range(3):
            across = axes[:, narrow] * np.array([1.0, 1.0, 0.0])
            if np.linalg.norm(across) < 0.9:
                continue
            across /= np.linalg.norm(across)
            width = 2 * float(half @ np.abs(axes.T @ across))
            if width > MAX_OPENING - SPARE_OPENING:
                continue
            for level, lean in product((np.cross(UP, across), np.cross(across, UP)), LEANS):
                approach = np.cos(lean) * level - np.sin(lean) * UP
                depth = float(half @ np.abs(axes.T @ level))
                grip = centre - max(0.0, depth - GRIP_DEPTH) * level
                grip[2] = max(grip[2], low + HAND_HALF * np.cos(lean))
                turn = float(np.arctan2(np.cross(level, into)[2], level @ into))
                grasp = SideGrasp(grip, approach, turn, _place(world, test, into, turn))
                beside = world.clearance(grip, side_rotation(world, approach), [geom], width / 2 + BESIDE)
                room = beside if beside < LEAST_ROOM else min(beside, _room(world, body, grasp))
                if room > LEAST_ROOM:
                    facing_back = max(0.0, -float(level[0]))  # the arm comes from there
                    worth = min(room, 0.01) - 0.006 * abs(turn) - 0.02 * facing_back - 0.002 * lean
                    rated.append((worth, len(rated), grasp))
    rated.sort(key=lambda entry: (-entry[0], entry[1]))
    return [grasp for _, _, grasp in rated]


def _room(world: World, body: int, grasp: SideGrasp) -> float:
    rotation, own = side_rotation(world, grasp.approach), world.geoms(body)
    room = min(world.clearance(grasp.grip - back * grasp.approach, rotation) for back in RETREATS)
    if room > LEAST_ROOM:
        turned = turn_about_vertical(grasp.turn)
        arrived = grasp.place + turned @ (grasp.grip - world.position(body))
        room = min(room, world.clearance(arrived, turned @ rotation, ignore=own))
    return room


def _place(world: World, test: InSite, into: np.ndarray, turn: float) -> np.ndarray:
    """Where the origin of the object is to go: no deeper into the region than it takes to be all inside."""
    centre, body = world.data.site_xpos[test.site].copy(), test.body
    half = half_extents(world.data, test)
    own = world.points(body) - world.position(body)
    centre[2] += ABOVE_FLOOR - half[2] - float(own[:, 2].min())
    owner = int(world.model.site_bodyid[test.site])
    walls = [world.box(geom) for geom in world.geoms(owner) if world.model.geom_bodyid[geom] == owner]
    entry = min(float((box[0] - centre) @ into - box[2] @ np.abs(box[1].T @ into)) for box in walls)
    rear = float(np.max(-(own @ turn_about_vertical(turn).T) @ into))
    least = EDGE - float(half @ np.abs(into))
    return centre + into * min(0.0, max(entry + ABOVE_FLOOR / 2 + rear, least))
