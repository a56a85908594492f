"""Skills for what moves on a joint: drawers are pulled and pushed, knobs and doors turned."""

from __future__ import annotations

from collections.abc import Iterator

import mujoco
import numpy as np

from pi0rl.libero import skills
from pi0rl.libero.goal import JointTest
from pi0rl.libero.grasping import parts
from pi0rl.libero.skills import CLOSED, OPEN, Progress
from pi0rl.libero.world import World

TILTS = (1.2, 1.0, 1.4, 0.8, 0.6, 0.4)  # rad by which the gripper leans when it reaches for a drawer's handle
UP = np.array([0.0, 0.0, 1.0])
ENOUGH_ROOM = 0.004  # m of distance to everything beyond which more does not make a lean better
LEAD, TURN_LEAD = 0.05, 0.5  # how far ahead of a moving handle (m) or knob (rad) the gripper is sent


def operate(world: World, test: JointTest, attempt: int) -> Iterator[np.ndarray]:
    """Move the first joint that fails a test towards passing it."""
    for address in test.qpos:
        if JointTest((address,), test.threshold, test.above, test.inclusive, every=True).holds(world.model, world.data):
            continue
        joint = int(np.flatnonzero(world.model.jnt_qposadr == address)[0])
        if world.model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_SLIDE:
            yield from slide(world, joint, test, attempt)
        else:
            yield from turn(world, joint, test, attempt)
        return


def opened(world: World, joint: int) -> JointTest:
    """The test that a drawer or a door stands open: beyond 85 % of its range."""
    end = _open_end(world, joint)
    return JointTest((int(world.model.jnt_qposadr[joint]),), 0.85 * end, end > 0, True, True)


def travel_of(world: World, drawer: int) -> np.ndarray:
    """How far a drawer will move when it is opened, float64 [3] (m)."""
    return world.data.xaxis[drawer] * (_open_end(world, drawer) - joint_position(world, drawer))


def _open_end(world: World, joint: int) -> float:
    """The end of a drawer's or door's range that is farther from 0: there it stands open."""
    low, high = world.model.jnt_range[joint]
    return float(low if abs(low) > abs(high) else high)


def joint_position(world: World, joint: int) -> float:
    return float(world.data.qpos[world.model.jnt_qposadr[joint]])


def slide(world: World, joint: int, test: JointTest, attempt: int) -> Iterator[np.ndarray]:
    """Pull a drawer open by its handle, or push it shut there."""
    body = int(world.model.jnt_bodyid[joint])
    low, high = world.model.jnt_range[joint]
    out = world.data.xaxis[joint] * (1.0 if abs(high) > abs(low) else -1.0)
    pulls = test.above == (abs(high) > abs(low))
    handle = _outermost(world, body, out)
    grip, thickness = _bar(world, handle, out)
    rotation = _handle_rotation(world, body, grip, out, attempt)
    away = rotation[:, 2] * -0.07 if pulls else out * 0.05
    gripper = OPEN if pulls else CLOSED
    contact = grip if pulls else grip + out * (thickness + 0.01)
    yield from skills.travel(world, contact + away, rotation, gripper)
    yield from skills.reach(world, contact, rotation, gripper)
    if pulls:
        yield from skills.squeeze_at(world, rotation)
    heading = out if pulls else -out
    line, progress = world.grip_point(), Progress()
    while not test.holds(world.model, world.data) and not progress.stalled(
        -abs(joint_position(world, joint)) if pulls else abs(joint_position(world, joint))
    ):
        here = world.grip_point()
        yield skills.steer_to(world, line + heading * (float((here - line) @ heading) + LEAD), rotation, CLOSED)
    yield from skills.hold(world, rotation, OPEN if pulls else CLOSED, 6 if pulls else 0)
    yield from skills.reach(world, world.grip_point() + away, rotation, gripper)


def _outermost(world: World, body: int, out: np.ndarray) -> int:
    """The geom of a body that reaches farthest in a direction: of a drawer, its handle."""

    def extent(geom: int) -> float:
        centre, axes, half = world.box(geom)
        return float(centre @ out + half @ np.abs(axes.T @ out))

    return max(world.geoms(body), key=extent)


def _bar(world: World, geom: int, out: np.ndarray) -> tuple[np.ndarray, float]:
    """Middle of a handle's bar and half its thickness in a direction (m)."""
    centre, axes, half = world.box(geom)
    return centre, float(half @ np.abs(axes.T @ out))


def _handle_rotation(world: World, body: int, grip: np.ndarray, out: np.ndarray, attempt: int) -> np.ndarray:
    """The gripper leaning so that it reaches for a horizontal bar, its fingers above and below; the lean with room."""
    rotations = [leaning(out, tilt) for tilt in TILTS]
    rotations = [skills.turned_least(world, rotation) for rotation in rotations]
    own = world.geoms(body)
    room = [min(ENOUGH_ROOM, world.clearance(grip, rotation, ignore=own)) for rotation in rotations]
    order = sorted(range(len(TILTS)), key=lambda index: -room[index])
    return rotations[order[attempt % len(order)]]


def leaning(out: np.ndarray, tilt: float) -> np.ndarray:
    """Orientation of the gripper that points down, leaning by ``tilt`` against ``out``, opening across a level bar."""
    approach = -np.cos(tilt) * UP - np.sin(tilt) * out
    opening = np.cross(approach, np.cross(UP, out))
    return np.column_stack([np.cross(opening, approach), opening, approach])


def turn(world: World, joint: int, test: JointTest, attempt: int) -> Iterator[np.ndarray]:
    """Grip a knob or the handle of a door and turn it about its hinge."""
    body = int(world.model.jnt_bodyid[joint])
    anchor, axis = world.data.xanchor[joint].copy(), world.data.xaxis[joint].copy()
    start = joint_position(world, joint)
    sign = float(np.sign(axis[2])) * (1.0 if test.above else -1.0)  # of the turn seen from above
    options = sorted(
        ((world.clearance(part.grip, skills.turned(part.yaw)), part) for part in parts(world, body)),
        key=lambda entry: -min(entry[0], 0.008) + 0.002 * abs(entry[1].yaw + sign * 0.5),  # wound up against the turn
    )
    if not options:
        return
    part = options[attempt % min(len(options), 4)][1]
    top = float(world.points(body)[:, 2].max())
    yield from skills.travel(world, np.array([*part.grip[:2], top + 0.04]), skills.turned(part.yaw), OPEN)
    yield from skills.reach(world, part.grip, skills.turned(part.yaw), OPEN)
    yield from skills.squeeze(world, part.yaw)
    arm, progress = world.grip_point() - anchor, Progress()
    while not test.holds(world.model, world.data):
        moved = abs(joint_position(world, joint) - start)
        if progress.stalled(-moved * 0.1):
            break
        angle = sign * (moved + TURN_LEAD)
        rotated = skills.turn_about_vertical(angle) @ arm
        yield skills.steer(world, anchor + rotated, part.yaw + angle, CLOSED)
    yield from skills.release(world, part.yaw + sign * abs(joint_position(world, joint) - start), 6)
    yield from skills.rise(world, top + 0.1, part.yaw + sign * abs(joint_position(world, joint) - start))
