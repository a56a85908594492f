"""One LIBERO task as a gymnasium environment: `gymnasium.make("pi0rl/Libero-v0", suite="libero_goal", task_id=3)`."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces

from pi0rl.errors import UserError
from pi0rl.libero.rendering import PROFILES, Renderer
from pi0rl.libero.simulation import ACTION_DIM, SETTLE_STEPS, Simulation, checked_actions
from pi0rl.libero.suites import Task, official_init_states, task

Observation = dict[str, np.ndarray]
RenderProfileName = Literal["reference", "fast"]

CAMERAS = ("agentview", "robot0_eye_in_hand")
# Drawn by LIBERO with the seed, or given as an array: no number among the official init states.
NO_INIT_STATE_ID = -1
_OPTIONS = ("init_state_id", "init_state", "settle_steps")


class LiberoEnv(gymnasium.Env[Observation, np.ndarray]):
    """A LIBERO task; same numbers, names and pictures as `libero.libero.envs.OffScreenRenderEnv`.

    Actions are 7 numbers in [-1, 1]: translation, rotation (axis-angle), gripper (-1 opens, 1 closes). Beyond that they
    are clipped, as LIBERO does. The reward is 1 on steps after which the goal is reached, else 0. An episode terminates
    with success and is truncated at the step limit; stepping on is allowed, as LIBERO allows it.

    Observations are LIBERO's own, images as it renders them (upside down), plus `state`, which openpi's policies take:
    `agentview_image` and `robot0_eye_in_hand_image` uint8 [size, size, 3]; `robot0_eef_pos` float64 [3] m,
    `robot0_eef_quat` float64 [4] xyzw, `robot0_gripper_qpos` float64 [2] m; `state` float32 [8].

    `info["is_success"]` says whether the goal is reached, `info["steps"]` how many control steps the call has executed
    (0 for a reset); after a reset `info["init_state_id"]` is the official init state's index or `NO_INIT_STATE_ID`.

    Args:
        suite: One of `pi0rl.libero.suites.SUITES`.
        task_id: Index in LIBERO's own task order.
        camera_size: Pixels of both square images.
        render_profile: "reference" (LIBERO's pixels) or "fast" (the same scene, simplified).
        step_limit: Control steps per episode, not counting those that settle; None takes the suite's.
        render_mode: None, or "rgb_array": `render` returns the third-person picture, upright.

    Raises:
        UserError: An argument is unknown or out of range, or the task's model cannot be built.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012

    def __init__(
        self,
        suite: str,
        task_id: int,
        camera_size: int = 256,
        render_profile: RenderProfileName = "reference",
        step_limit: int | None = None,
        render_mode: str | None = None,
    ):
        self.task = task(suite, task_id)
        self.step_limit = checked_step_limit(step_limit, self.task)
        self.render_mode = checked_render_mode(render_mode)
        self._renderer = shared_renderer(camera_size, render_profile)
        self.observation_space, self.action_space = observation_space(camera_size), action_space()
        self._simulation = Simulation(self.task)
        self._steps = 0

    @property
    def language(self) -> str:
        """The instruction."""
        return self.task.language

    @property
    def qpos(self) -> np.ndarray:
        """Joint positions [nq], a copy."""
        return self._simulation.qpos

    @property
    def qvel(self) -> np.ndarray:
        """Joint velocities [nv], a copy."""
        return self._simulation.qvel

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode.

        Args:
            seed: Decides where LIBERO puts the fixtures (they are no part of an init state); kept until another is
                given, at first 0. The first use of a seed on this machine takes some seconds.
            options: `{"init_state_id": i}` picks an official init state, `{"init_state": array}` gives one (time,
                qpos, qvel). With neither, a reset with a seed keeps the placement that LIBERO draws with it, and one
                without a seed draws an official init state. `{"settle_steps": n}` (default 10) control steps pass
                while objects come to rest.

        Raises:
            UserError: An option is unknown or does not fit the task.
        """
        init_state_id, init_state, settle_steps = self._checked_options(options or {})
        if seed is not None:
            seed = _checked_seed(seed)
        super().reset(seed=seed)
        if seed is not None and seed != self._simulation.seed:
            self._simulation = Simulation(self.task, seed)
        official = official_init_states(self.task)
        if init_state is None and init_state_id is None and seed is None:
            init_state_id = int(self.np_random.integers(len(official)))
        if init_state_id is not None:
            init_state = official[init_state_id]
        self._simulation.reset(init_state, settle_steps)
        self._steps = 0
        info = {
            "is_success": self._simulation.success(),
            "steps": 0,
            "init_state_id": NO_INIT_STATE_ID if init_state_id is None else init_state_id,
        }
        return self._observe(), info

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Advance by one control step (50 ms).

        Raises:
            UserError: The action is not 7 finite numbers.
        """
        return self._execute(checked_actions(action, (ACTION_DIM,))[None])

    def step_chunk(self, actions: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Execute `actions` [C, 7] until the episode ends, and look only then; the reward is the sum over its steps.

        Raises:
            UserError: The actions are not at least one row of 7 finite numbers.
        """
        return self._execute(checked_actions(actions, (None, ACTION_DIM)))

    def render(self) -> np.ndarray | None:
        """The third-person picture, upright, uint8 [size, size, 3]; None without a render mode."""
        return self._picture("agentview")[::-1].copy() if self.render_mode == "rgb_array" else None

    def _execute(self, actions: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        executed, success, truncated = 0, False, False
        for action in actions:
            success = self._simulation.step(action)
            executed += 1
            self._steps += 1
            truncated = not success and self._steps >= self.step_limit
            if success or truncated:
                break
        info = {"is_success": success, "steps": executed}
        return self._observe(), float(success), success, truncated, info

    def _observe(self) -> Observation:
        images = {f"{camera}_image": self._picture(camera) for camera in CAMERAS}
        return {**images, **self._simulation.proprioception(), "state": self._simulation.state()}

    def _picture(self, camera: Literal["agentview", "robot0_eye_in_hand"]) -> np.ndarray:
        simulation = self._simulation
        return self._renderer.render(self.task, simulation.seed, simulation.render_state(), camera)

    def _checked_options(self, options: Mapping[str, Any]) -> tuple[int | None, np.ndarray | None, int]:
        unknown = [name for name in options if name not in _OPTIONS]
        if unknown:
            raise UserError(f"unknown reset option {unknown[0]!r}: expected {', '.join(_OPTIONS)}")
        init_state_id, init_state = options.get("init_state_id"), options.get("init_state")
        if init_state_id is not None and init_state is not None:
            raise UserError("reset options init_state_id and init_state: give one of them, not both")
        if init_state_id is not None:
            available = len(official_init_states(self.task))
            init_state_id = _integer(init_state_id, "init_state_id")
            if not 0 <= init_state_id < available:
                raise UserError(
                    f"init_state_id {init_state_id} of {self.task.suite} task {self.task.task_id}: "
                    f"expected 0 to {available - 1}"
                )
        if init_state is not None:
            init_state = self._simulation.checked_state(init_state)
        settle_steps = _integer(options.get("settle_steps", SETTLE_STEPS), "settle_steps")
        if settle_steps < 0:
            raise UserError(f"settle_steps {settle_steps}: expected 0 or more")
        return init_state_id, init_state, settle_steps


def observation_space(camera_size: int) -> spaces.Space[Observation]:
    """What an environment returns."""
    return spaces.Dict(observation_boxes(camera_size))  # pyright: ignore[reportReturnType, reportArgumentType]


def observation_boxes(camera_size: int) -> dict[str, spaces.Box]:
    """The parts of an observation, by LIBERO's names."""
    picture = spaces.Box(0, 255, (camera_size, camera_size, 3), np.uint8)
    return {
        **{f"{camera}_image": picture for camera in CAMERAS},
        "robot0_eef_pos": _unbounded(3, np.float64),
        "robot0_eef_quat": _unbounded(4, np.float64),
        "robot0_gripper_qpos": _unbounded(2, np.float64),
        "state": _unbounded(8, np.float32),
    }


def action_space() -> spaces.Box:
    """Translation, rotation and gripper, each in [-1, 1]."""
    return spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)


@cache
def shared_renderer(camera_size: int, render_profile: RenderProfileName) -> Renderer:
    """This process's renderer of that kind: all environments share the render models, which are large.

    Raises:
        UserError: The profile is unknown or the size out of range.
    """
    if render_profile not in PROFILES:
        raise UserError(f"unknown render_profile {render_profile!r}: expected {' or '.join(PROFILES)}")
    return Renderer(camera_size, PROFILES[render_profile])


def checked_step_limit(step_limit: int | None, task: Task) -> int:
    """The limit, or the task's own.

    Raises:
        UserError: It is not positive.
    """
    if step_limit is None:
        return task.max_episode_steps
    if step_limit < 1:
        raise UserError(f"step_limit {step_limit}: expected 1 or more control steps, or None for the suite's")
    return step_limit


def checked_render_mode(render_mode: str | None) -> str | None:
    """None or "rgb_array".

    Raises:
        UserError: It is something else.
    """
    if render_mode not in (None, "rgb_array"):
        raise UserError(f"unknown render_mode {render_mode!r}: expected 'rgb_array' or None")
    return render_mode


def _unbounded(size: int, dtype: type[np.floating]) -> spaces.Box:
    return spaces.Box(-np.inf, np.inf, (size,), dtype)  # pyright: ignore[reportArgumentType]


def _checked_seed(seed: int) -> int:
    seed = _integer(seed, "seed")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed {seed}: expected 0 to 2**32 - 1, as LIBERO takes them")
    return seed


def _integer(value: Any, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise UserError(f"{name} {value!r}: expected a whole number") from None
