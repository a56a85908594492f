"""A scripted expert: from a task's goal and privileged state to actions.

It plays goals of the kind "put this object in or on that": pick the object from above, carry it over its destination,
let go; a grasp that slips is tried again.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pi0rl.errors import UserError
from pi0rl.libero import skills
from pi0rl.libero.compile import compiled_task
from pi0rl.libero.goal import GoalTest, InSite, JointTest, OnObject, OnSite
from pi0rl.libero.simulation import Simulation
from pi0rl.libero.skills import Destination, Grasp, World

ATTEMPTS = 6
YAWS = np.deg2rad([0, 15, -15, 30, -30, 45, -45, 60, -60, 75, -75, 90])
SPARE_OPENING = 0.008  # m that must be left between the open fingers and the object
GRIP_BELOW_TOP = 0.010  # m; further down, an opening finger can catch under the roof of a carton
GRIP_ABOVE_FLOOR = 0.008  # m; lower, the finger tips touch the floor
RIM_CLEARANCE = 0.02  # m by which an object passes over the rim of what it is put into, and sinks in before release
OVER_DESTINATION = 0.04  # m of horizontal distance within which letting go has a chance


class Expert:
    """A policy with eyes for everything: one action per control step, until success or the step limit.

    Args:
        simulation: the slot to play in, already reset; the expert reads it before every action.
        rng: where ``disturb`` draws from; ``action`` itself draws nothing.

    Raises:
        UserError: for a task whose goal is not "put an object in or on something".
    """

    def __init__(self, simulation: Simulation, rng: np.random.Generator):
        goal = compiled_task(simulation.task, simulation.seed).goal
        if any(isinstance(test, JointTest) for test in goal):
            raise UserError(
                f"no expert for {simulation.task.suite} task {simulation.task.task_id} ({simulation.task.language!r}): "
                "it can only put objects in or on something; choose other tasks or bring demonstrations"
            )
        self._rng = rng
        self._drift = np.zeros(6)
        self._actions = _play(World(simulation), goal)

    def action(self) -> np.ndarray:
        """The action for the next control step, float64 [7] in [-1, 1]; stands still, fingers open, when it gave up."""
        return next(self._actions, np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, skills.OPEN]))

    def disturb(self, action: np.ndarray, noise: float) -> np.ndarray:
        """The action with correlated noise on its six motion numbers, to be executed in the action's place.

        The label of the step stays the undisturbed action, so that the data show how to come back (DART, Laskey et
        al. 2017). ``noise`` is the stationary standard deviation in units of the action, a fifth of it for rotations;
        a step keeps 0.8 of the last one's noise.
        """
        fresh = self._rng.standard_normal(6) * np.array([1.0, 1.0, 1.0, 0.2, 0.2, 0.2])
        self._drift = 0.8 * self._drift + 0.6 * fresh
        return np.clip(np.concatenate([action[:6] + noise * self._drift, action[6:]]), -1.0, 1.0)


def _play(world: World, goal: tuple[GoalTest, ...]) -> Iterator[np.ndarray]:
    for test in goal:
        for attempt in range(ATTEMPTS):
            if test.holds(world.simulation.model, world.simulation.data):
                break
            yield from _pick_and_place(world, test, attempt)


def _pick_and_place(world: World, test: GoalTest, attempt: int) -> Iterator[np.ndarray]:
    assert not isinstance(test, JointTest)
    body = test.upper_body if isinstance(test, OnObject) else test.body
    choice = choose_grasp(world, body, attempt)
    yield from skills.grasp(world, body, choice)
    to = destination(world, test)
    yield from skills.carry(world, body, to, choice.yaw)
    arrived = np.linalg.norm(world.position(body)[:2] - to.centre) < OVER_DESTINATION
    yield from skills.release(world, choice.yaw, 12 if arrived else 4)
    yield from skills.rise(world, to.rim + 0.1, choice.yaw)


def choose_grasp(world: World, body: int, attempt: int) -> Grasp:
    """A top grasp in the middle of the object, with the smallest turn for which the open fingers pass around it.

    Later attempts take the next turns, so that a grasp that failed is not repeated.
    """
    points = world.points(body)
    low, high = points.min(axis=0), points.max(axis=0)
    widths = [float(np.ptp(points[:, :2] @ np.array([-np.sin(yaw), np.cos(yaw)]))) for yaw in YAWS]
    fitting = [yaw for yaw, width in zip(YAWS, widths, strict=True) if width < skills.MAX_OPENING - SPARE_OPENING]
    yaw = fitting[attempt % len(fitting)] if fitting else YAWS[int(np.argmin(widths))]
    height = max(low[2] + GRIP_ABOVE_FLOOR, high[2] - GRIP_BELOW_TOP)
    grip = np.array([*(low + high)[:2] / 2, height])
    return Grasp(grip - world.position(body), float(yaw), float(high[2] + 0.02))


def destination(world: World, test: InSite | OnSite | OnObject) -> Destination:
    """Where a goal wants its object: the middle of a region, or of another object."""
    simulation = world.simulation
    if isinstance(test, OnObject):
        owner, centre = test.lower_body, world.position(test.lower_body)
    else:
        owner, centre = int(simulation.model.site_bodyid[test.site]), simulation.data.site_xpos[test.site]
    rim = float(world.points(owner)[:, 2].max())
    return Destination(centre[:2].copy(), rim + RIM_CLEARANCE, rim - RIM_CLEARANCE)
