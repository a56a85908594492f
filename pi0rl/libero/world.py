"""The expert's privileged view of a running simulation: the gripper, the objects, and how much room there is.

Objects are named by the index of their root body. Geometry is that of the collision geoms, the only ones there are in
the physics-only model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import mujoco
import numpy as np

from pi0rl.libero.compile import compiled_task
from pi0rl.libero.simulation import Simulation

OPEN_FINGER = 0.04  # m from the middle to either finger pad when the gripper is open
_FAR = 0.05  # m beyond which distances are all the same
_SAMPLE_SPACING = 0.012  # m between sampled surface points
_BACKDROP = 0.4  # m; geoms with a longer half side are table, floor or wall


class World:
    """Everything the expert may look at. Positions in the world frame (m), angles in rad."""

    def __init__(self, simulation: Simulation):
        self.simulation = simulation
        self.model = simulation.model
        self.data = simulation.data
        self._corners: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def grip_point(self) -> np.ndarray:
        """Position of the point between the finger tips, float64 [3] (m)."""
        return self.simulation.proprioception()["robot0_eef_pos"]

    def grip_rotation(self) -> np.ndarray:
        """Orientation of the hand as a rotation matrix [3, 3]: the fingers open along its second column and point
        along its third."""
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
        return self.data.xpos[body].copy()

    def rotation(self, body: int) -> np.ndarray:
        """Orientation of a body's frame [3, 3]."""
        return self.data.xmat[body].reshape(3, 3).copy()

    def points(self, body: int) -> np.ndarray:
        """Corners of the boxes around all collision geoms of an object, float64 [n, 3], world frame (m)."""
        if body not in self._corners:
            self._corners[body] = _collision_corners(self.model, body)
        owners, corners = self._corners[body]
        rotations = self.data.xmat[owners].reshape(-1, 3, 3)
        return self.data.xpos[owners] + np.einsum("nij,nj->ni", rotations, corners)

    def geoms(self, body: int) -> list[int]:
        """Collision geoms of a body and of all bodies attached to it."""
        return [geom for geom in self._collision_geoms if self._under(int(self.model.geom_bodyid[geom]), body)]

    def box(self, geom: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The box around a geom: centre [3], axes as columns [3, 3], half sides [3] (m)."""
        axes = self.data.geom_xmat[geom].reshape(3, 3)
        aabb = self.model.geom_aabb[geom]
        return self.data.geom_xpos[geom] + axes @ aabb[:3], axes.copy(), aabb[3:].copy()

    def root(self, body: int) -> int:
        """The object or fixture a body belongs to."""
        return int(self.model.body_rootid[body])

    def touching(self, body: int, other: int) -> bool:
        """Whether two bodies' trees are in contact."""
        pairs = self.model.geom_bodyid[self.data.contact.geom[: self.data.ncon]]
        return any(
            (self._under(one, body) and self._under(two, other)) or (self._under(two, body) and self._under(one, other))
            for one, two in pairs.tolist()
        )

    def held_bodies(self) -> tuple[int, ...]:
        """Root bodies of the loose things that touch the gripper."""
        pairs = self.model.geom_bodyid[self.data.contact.geom[: self.data.ncon]].tolist()
        touched = {
            two if one in self._hand_bodies else one
            for one, two in pairs
            if (one in self._hand_bodies) != (two in self._hand_bodies)
        }
        return tuple(sorted({self.root(body) for body in touched if self.is_loose(body)}))

    def is_loose(self, body: int) -> bool:
        """Whether an object can be picked up: it hangs on a free joint."""
        joint = int(self.model.body_jntadr[self.root(body)])
        return joint >= 0 and self.model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_FREE

    def surface(self, ignore: Sequence[int] = ()) -> np.ndarray:
        """Points on the boxes around everything that stands on the table, about a centimetre apart, float64 [n, 3].

        Args:
            ignore: root bodies left out; robot, table, floor and walls always are.
        """
        owners, local = self._samples
        keep = ~np.isin(self.model.body_rootid[self.model.geom_bodyid[owners]], np.array(ignore, int))
        owners, local = owners[keep], local[keep]
        rotations = self.data.geom_xmat[owners].reshape(-1, 3, 3)
        return self.data.geom_xpos[owners] + np.einsum("nij,nj->ni", rotations, local)

    def inner_floor(self, body: int) -> float:
        """Height of the top of an object in its middle (m): where the inside of a bowl or plate begins."""
        points = self.surface([other for other in range(1, self.model.nbody) if other != self.root(body)])
        near = np.linalg.norm(points[:, :2] - self.position(body)[:2], axis=1) < 0.015
        return float(np.max(points[:, 2], where=near, initial=float(self.points(body)[:, 2].min())))

    def highest_between(self, start: np.ndarray, end: np.ndarray, radius: float, ignore: Sequence[int] = ()) -> float:
        """Height of the highest thing within ``radius`` of a horizontal way (m); minus infinity if there is none."""
        points = self.surface(ignore)
        way = end - start
        share = np.clip((points[:, :2] - start) @ way / max(float(way @ way), 1e-9), 0.0, 1.0)
        lateral = np.linalg.norm(points[:, :2] - start - share[:, None] * way, axis=1)
        return float(np.max(points[:, 2], where=lateral < radius, initial=-np.inf))

    def way_from_under(self, body: int, margin: float) -> np.ndarray:
        """How far to move an object to have no fixture over it, float64 [3], level (m); zero if there is none."""
        loose = [other for other in range(1, self.model.nbody) if self.is_loose(other)]
        points, own, here = self.surface(loose), self.points(body), self.position(body)
        radius = float(np.linalg.norm(own[:, :2] - here[:2], axis=1).max())
        away = np.linalg.norm(points[:, :2] - here[:2], axis=1)
        over = (points[:, 2] > own[:, 2].max() - 0.005) & (away < radius)
        if not over.any():
            return np.zeros(3)
        from_roof = here[:2] - points[over, :2].mean(axis=0)
        length = radius + margin - float(away[over].min())
        return np.array([*(from_roof / np.linalg.norm(from_roof) * length), 0.0])

    def clearance(
        self, grip: np.ndarray, rotation: np.ndarray, ignore: Sequence[int] = (), spread: float = OPEN_FINGER
    ) -> float:
        """Distance of the gripper, were it at a pose, to the nearest collision geom (m); negative where they overlap.

        Args:
            grip: the grip point [3].
            rotation: orientation of the hand [3, 3], as ``grip_rotation`` gives it.
            ignore: geoms left out; the robot always is.
            spread: distance of either finger pad from the middle (m).
        """
        geoms, offsets, turns, fingers = self._gripper
        scratch = self._scratch
        scratch.geom_xpos[:] = self.data.geom_xpos
        scratch.geom_xmat[:] = self.data.geom_xmat
        scratch.geom_xpos[geoms] = grip + (offsets - fingers * (OPEN_FINGER - spread)) @ rotation.T
        scratch.geom_xmat[geoms] = (rotation @ turns).reshape(-1, 9)
        others = np.setdiff1d(self._scene_geoms, np.array(ignore, int))
        nearest, pair = _FAR, np.zeros(6)
        for geom in geoms:
            reach = self.model.geom_rbound[geom] + self.model.geom_rbound[others] + nearest
            apart = np.linalg.norm(scratch.geom_xpos[others] - scratch.geom_xpos[geom], axis=1)
            for other in others[apart < reach]:
                nearest = min(nearest, mujoco.mj_geomDistance(self.model, scratch, geom, int(other), _FAR, pair))
        return float(nearest)

    def _under(self, body: int, ancestor: int) -> bool:
        while body > ancestor:  # parents come before their children
            body = int(self.model.body_parentid[body])
        return body == ancestor

    def _of_robot(self, geom: int) -> bool:
        return self.model.body(int(self.model.geom_bodyid[geom])).name.startswith(("robot", "gripper", "mount"))

    @cached_property
    def _hand_bodies(self) -> frozenset[int]:
        bodies = range(self.model.nbody)
        return frozenset(body for body in bodies if self.model.body(body).name.startswith("gripper"))

    @cached_property
    def _scratch(self) -> mujoco.MjData:
        return mujoco.MjData(self.model)

    @cached_property
    def _collision_geoms(self) -> np.ndarray:
        return np.flatnonzero((self.model.geom_contype != 0) | (self.model.geom_conaffinity != 0))

    @cached_property
    def _scene_geoms(self) -> np.ndarray:
        planes = self.model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE
        return np.array([geom for geom in self._collision_geoms if not planes[geom] and not self._of_robot(geom)])

    @cached_property
    def _gripper(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The gripper's geoms [n], their places [n, 3] and orientations [n, 3, 3] in the hand's frame about the grip
        point with the fingers open, and which way each opens [n, 3]."""
        names = [self.model.body(int(body)).name for body in self.model.geom_bodyid]
        geoms = np.array([geom for geom in self._collision_geoms if names[geom].startswith("gripper")])
        robot = compiled_task(self.simulation.task, self.simulation.seed).robot
        hand = self.rotation(robot["hand_body"])
        grip = self.data.site_xpos[robot["grip_site"]]
        offsets = (self.data.geom_xpos[geoms] - grip) @ hand
        turns = hand.T @ self.data.geom_xmat[geoms].reshape(-1, 3, 3)
        fingers = np.zeros((len(geoms), 3))
        moving = np.array(["finger" in names[geom] for geom in geoms])
        fingers[moving, 1] = np.sign(offsets[moving, 1])
        offsets += fingers * (OPEN_FINGER - self.finger_width() / 2)
        return geoms, offsets, turns, fingers

    @cached_property
    def _samples(self) -> tuple[np.ndarray, np.ndarray]:
        """Points on the boxes of all things and fixtures: whose frame they are in [n], and where [n, 3]."""
        owners, points = [], []
        for geom in self._scene_geoms:
            half = self.model.geom_aabb[geom, 3:]
            if half.max() > _BACKDROP:
                continue
            ticks = [np.linspace(-side, side, max(2, int(np.ceil(2 * side / _SAMPLE_SPACING)) + 1)) for side in half]
            grid = np.stack(np.meshgrid(*ticks, indexing="ij"), axis=-1).reshape(-1, 3)
            grid = grid[(np.abs(grid) > half - 1e-9).any(axis=1)]
            owners.append(np.full(len(grid), geom))
            points.append(self.model.geom_aabb[geom, :3] + grid)
        return np.concatenate(owners), np.concatenate(points)


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
