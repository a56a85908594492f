"""Where an object is to go, from a goal: the free spot of a region or the middle of another object."""

from __future__ import annotations

import mujoco
import numpy as np

from pi0rl.libero.goal import InSite, OnObject, OnSite, half_extents
from pi0rl.libero.skills import MAX_OPENING, Destination, turn_about_vertical
from pi0rl.libero.world import World

RIM_CLEARANCE = 0.02  # m by which an object passes over the rim of what it is put into, and sinks in before release
OBSTACLE_CLEARANCE = 0.02  # m by which it passes over things on the way
TURNS = np.deg2rad(np.arange(-90, 91, 10))
FLAT = 0.04  # m
HAND_ROOM = 0.06  # m kept between the middle of an object and a drawer that opens over it
EDGE = 0.015  # m kept from the edge of a region
GAP = 0.01  # m wanted between objects in one region


Placement = InSite | OnSite | OnObject


def moved_body(test: Placement) -> int:
    """The body whose place the goal is about."""
    return test.upper_body if isinstance(test, OnObject) else test.body


def container_joint(world: World, test: Placement) -> int | None:
    """The joint of the drawer that a goal wants its object in, if it is one."""
    if not isinstance(test, InSite):
        return None
    body = int(world.model.site_bodyid[test.site])
    joint = int(world.model.body_jntadr[body])
    return joint if joint >= 0 and world.model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_SLIDE else None


def is_dragged(world: World, test: Placement) -> bool:
    """Whether a goal is reached by pushing: its object is too wide and too flat to be picked up, and goes to a zone of
    the table."""
    if not isinstance(test, OnSite) or test.owner_geoms:
        return False
    extent = np.ptp(world.points(test.body), axis=0)
    return bool(extent[2] < FLAT and extent[:2].min() > MAX_OPENING)


def aside(world: World, body: int, drawer: int, travel: np.ndarray) -> np.ndarray | None:
    """Where to drag an object from under a drawer that is about to open, with room for the hand; None if it may stay.

    Args:
        world: the world.
        body: the object.
        drawer: the drawer's body.
        travel: float64 [3], how far the drawer will move (m).
    """
    here, points = world.position(body)[:2], world.points(drawer)[:, :2]
    low = np.minimum(points.min(axis=0), (points + travel[:2]).min(axis=0)) - HAND_ROOM
    high = np.maximum(points.max(axis=0), (points + travel[:2]).max(axis=0)) + HAND_ROOM
    if (here < low).any() or (here > high).any():
        return None
    radius = float(np.linalg.norm(world.points(body)[:, :2] - here, axis=1).max())
    angles = np.linspace(-np.pi, np.pi, 16, endpoint=False)
    spots = [here + reach * np.array([np.cos(a), np.sin(a)]) for reach in np.arange(0.03, 0.3, 0.02) for a in angles]
    for spot in spots:
        outside = (spot < low).any() or (spot > high).any()
        halfway = (here + spot) / 2  # what it touches now it may leave
        if outside and world.highest_between(halfway, spot, radius, ignore=[world.root(body)]) == -np.inf:
            return spot
    return None


def destination(world: World, test: Placement) -> Destination:
    """Where a goal wants its object: a free spot of a region, or the middle of another object."""
    body = moved_body(test)
    if isinstance(test, OnObject):
        owner, centre = test.lower_body, world.position(test.lower_body)[:2]
        top = float(world.points(owner)[:, 2].max())
    else:
        owner, centre = int(world.model.site_bodyid[test.site]), _free_spot(world, test, body)
        zone = isinstance(test, OnSite) and not test.owner_geoms  # of the table
        top = float(world.data.site_xpos[test.site][2] if zone else world.points(owner)[:, 2].max())
    turn, floor = 0.0, top - RIM_CLEARANCE
    if isinstance(test, InSite) and not _fits(world, test):
        turn, centre = _fitted(world, test, centre)
        floor = min(floor, _sunk(world, test))
    rim = max(top + RIM_CLEARANCE, _over_obstacles(world, body, centre))
    if isinstance(test, InSite):
        return Destination(centre, rim, floor, turn=turn)
    return Destination(centre, rim, floor if isinstance(test, OnObject) else top - 0.004, owner)


def _fits(world: World, test: InSite) -> bool:
    """Whether an object fits into a region as it is turned now, with its origin in the middle."""
    footprint = world.points(test.body)[:, :2] - world.position(test.body)[:2]
    return bool((np.abs(footprint).max(axis=0) < half_extents(world.data, test)[:2]).all())


def _sunk(world: World, test: InSite) -> float:
    """Height of the object's lowest point when its origin is a centimetre inside a region."""
    below = float(world.position(test.body)[2] - world.points(test.body)[:, 2].min())
    return float(world.data.site_xpos[test.site][2] + half_extents(world.data, test)[2]) - below - 0.01


def _fitted(world: World, test: InSite, spot: np.ndarray) -> tuple[float, np.ndarray]:
    """The smallest turn with which an object fits into a narrow region, and where its origin has to be to centre it."""
    half = half_extents(world.data, test)[:2]
    footprint = world.points(test.body)[:, :2] - world.position(test.body)[:2]

    def excess(turn: float) -> float:
        extent = np.ptp(footprint @ turn_about_vertical(turn)[:2, :2].T, axis=0) / 2
        return round(float(np.maximum(0.0, extent - half).sum()), 3)

    turn = min(TURNS, key=lambda turn: (excess(turn), abs(turn)))
    turned = footprint @ turn_about_vertical(turn)[:2, :2].T
    return float(turn), spot - (turned.min(axis=0) + turned.max(axis=0)) / 2


def _free_spot(world: World, test: InSite | OnSite, body: int) -> np.ndarray:
    """The middle of a region, or the place nearest to it that other objects leave free."""
    centre = world.data.site_xpos[test.site][:2].copy()
    extents = half_extents(world.data, test)
    half = extents[:2] - EDGE
    low = world.data.site_xpos[test.site][2] - (extents[2] if isinstance(test, InSite) else 0.0)
    others = [other for other in range(1, world.model.nbody) if world.root(other) == other and world.is_loose(other)]
    fixed = [other for other in range(1, world.model.nbody) if world.root(other) == other and other not in others]
    points = world.surface(ignore=[*fixed, body])
    points = points[points[:, 2] > low, :2]
    own = world.points(body)[:, :2] - world.position(body)[:2]
    radius = float(np.linalg.norm(own, axis=1).max()) * 0.8
    ticks = np.linspace(-1.0, 1.0, 5)
    spots = [centre] + [centre + np.array([x, y]) * np.maximum(half, 0.0) for x in ticks for y in ticks]
    if not len(points):
        return centre

    def badness(spot: np.ndarray) -> float:
        gap = float(np.linalg.norm(points - spot, axis=1).min()) - radius
        return max(0.0, GAP - gap) + 0.1 * float(np.linalg.norm(spot - centre))

    return min(spots, key=badness)


def _over_obstacles(world: World, body: int, centre: np.ndarray) -> float:
    """Height that the object's lowest point needs to pass over everything between it and its destination."""
    here = world.position(body)[:2]
    radius = float(np.linalg.norm(world.points(body)[:, :2] - here, axis=1).max())
    return world.highest_between(here, centre, radius + 0.01, ignore=[world.root(body)]) + OBSTACLE_CLEARANCE
