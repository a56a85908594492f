"""A scripted expert: from a task's goal and privileged state to actions.

It takes the goal's tests in the order in which they can be met, meets each with one skill, and looks again: a test that
does not hold is tried again in another way. Nothing in it knows a task, a scene or an object by name.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pi0rl.libero import mechanisms, skills
from pi0rl.libero.goal import GoalTest, InSite, JointTest, OnObject
from pi0rl.libero.grasping import choose_grasp
from pi0rl.libero.inserting import insert, way_in
from pi0rl.libero.placing import Placement, aside, container_joint, destination, is_dragged, moved_body
from pi0rl.libero.simulation import Simulation
from pi0rl.libero.world import World

ATTEMPTS = 6
ROOF_CLEARANCE = 0.008  # m by which an object is pulled out from under an edge before it is lifted
OVER_DESTINATION = 0.04  # m of horizontal distance within which letting go has a chance


class Expert:
    """A policy with eyes for everything: one action per control step, until success or the step limit.

    Args:
        simulation: the slot to play in, already reset; the expert reads it before every action.
        rng: where ``disturb`` draws from; ``action`` itself draws nothing.
    """

    def __init__(self, simulation: Simulation, rng: np.random.Generator):
        self._rng = rng
        self._drift = np.zeros(6)
        self._actions = _play(World(simulation), simulation.goal)

    def action(self) -> np.ndarray:
        """The action for the next control step, float64 [7] in [-1, 1]; stands still, fingers open, when it gave up."""
        return next(self._actions, np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, skills.OPEN]))

    def disturb(self, action: np.ndarray, noise: float) -> np.ndarray:
        """The action with correlated noise on its six motion numbers, to be executed in the action's place.

        The label of the step stays the undisturbed action, so that the data show how to come back (after DART, Laskey
        et al. 2017). ``noise`` is the stationary standard deviation in units of the action, a fifth of it for
        rotations; a step keeps 0.8 of the last one's noise.
        """
        fresh = self._rng.standard_normal(6) * np.array([1.0, 1.0, 1.0, 0.2, 0.2, 0.2])
        self._drift = 0.8 * self._drift + 0.6 * fresh
        return np.clip(np.concatenate([action[:6] + noise * self._drift, action[6:]]), -1.0, 1.0)


def _play(world: World, goal: tuple[GoalTest, ...]) -> Iterator[np.ndarray]:
    tests = _in_order(world, goal)
    attempts = [0] * len(tests)
    while True:
        pending = [index for index, test in enumerate(tests) if not test.holds(world.model, world.data)]
        if not pending or attempts[pending[0]] >= ATTEMPTS:
            return
        index = pending[0]
        yield from _achieve(world, tests[index], attempts[index])
        attempts[index] += 1


def _in_order(world: World, goal: tuple[GoalTest, ...]) -> list[GoalTest]:
    """What is opened or turned first, then what is put somewhere, lower things first; what is closed comes last."""
    placements = [test for test in goal if not isinstance(test, JointTest)]

    def rank(test: GoalTest) -> int:
        if isinstance(test, JointTest):
            joint = int(np.flatnonzero(world.model.jnt_qposadr == test.qpos[0])[0])
            return 0 if test.above == mechanisms.opened(world, joint).above else len(goal) + 1
        lower = [other for other in placements if isinstance(test, OnObject) and moved_body(other) == test.lower_body]
        return 1 + max((rank(other) for other in lower), default=0)

    return sorted(goal, key=rank)


def _achieve(world: World, test: GoalTest, attempt: int) -> Iterator[np.ndarray]:
    if isinstance(test, JointTest):
        yield from mechanisms.operate(world, test, attempt)
        return
    yield from _open_container(world, test, attempt)
    into = way_in(world, test) if isinstance(test, InSite) else None
    if isinstance(test, InSite) and into is not None:
        yield from insert(world, test, into, attempt)
    elif is_dragged(world, test):
        yield from skills.drag(world, moved_body(test), destination(world, test).centre)
    else:
        yield from _pick_and_place(world, test, attempt)


def _open_container(world: World, test: Placement, attempt: int) -> Iterator[np.ndarray]:
    """Open the drawer an object is to go into, if it is shut; the object is first moved from where it would be under
    the drawer."""
    drawer = container_joint(world, test)
    if drawer is None or mechanisms.opened(world, drawer).holds(world.model, world.data):
        return
    spot = aside(world, moved_body(test), int(world.model.jnt_bodyid[drawer]), mechanisms.travel_of(world, drawer))
    if spot is not None:
        yield from skills.drag(world, moved_body(test), spot)
    yield from mechanisms.operate(world, mechanisms.opened(world, drawer), attempt)


def _pick_and_place(world: World, test: Placement, attempt: int) -> Iterator[np.ndarray]:
    body = moved_body(test)
    choice = choose_grasp(world, body, attempt, destination(world, test))
    if choice is None:
        return
    rotation, here = skills.turned(choice.yaw), world.grip_point()
    leans = world.grip_rotation()[2, 2] > -0.95
    if leans or (np.isfinite(choice.ceiling) and here[2] < choice.clear_height - 0.1):
        above = np.array([*(world.position(body) + choice.offset)[:2], choice.clear_height + 0.02])
        yield from skills.travel(world, above, rotation, skills.OPEN, near=0.03)
    yield from skills.grasp(world, body, choice)
    out = world.way_from_under(body, ROOF_CLEARANCE)
    if out.any():
        yield from skills.reach(world, world.grip_point() + out, rotation, skills.CLOSED)
    to = destination(world, test)
    yield from skills.carry(world, body, to, choice.yaw)
    arrived = np.linalg.norm(world.position(body)[:2] - to.centre) < OVER_DESTINATION
    yield from skills.release(world, choice.yaw + to.turn, 12 if arrived else 4)
    yield from skills.rise(world, to.rim + 0.1, choice.yaw + to.turn)
