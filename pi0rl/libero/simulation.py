"""One slot: a LIBERO task simulated exactly as the reference environment does it, without its cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np

from pi0rl.errors import UserError
from pi0rl.libero import controller
from pi0rl.libero.compile import compiled_task
from pi0rl.libero.goal import GoalTest, goal_reached
from pi0rl.libero.suites import Task

ACTION_DIM = 7
# Stand still with the gripper opening, as openpi and LIBERO do while the objects settle.
SETTLE_ACTION = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
SETTLE_STEPS = 10
_SNAPSHOT_FIELDS = tuple(name for name in controller.ArmState._fields if name not in ("gripper", "stale"))


@dataclass(frozen=True)
class RenderState:
    """What a picture of the scene depends on, at the instant at which the reference renders.

    Attributes:
        qpos: Joint positions [nq] from which to compute all frames.
        body_pos: Body positions [nbody, 3] in their parents, with the fixtures where the seed put them (m).
        body_quat: Body orientations [nbody, 4] likewise, wxyz.
        site_rgba: Site colours [nsite, 4]; alpha tells whether a stove is on.
    """

    qpos: np.ndarray
    body_pos: np.ndarray
    body_quat: np.ndarray
    site_rgba: np.ndarray


class Simulation:
    """A task with its fixtures drawn from `seed`, bit-identical to `libero.libero.envs.OffScreenRenderEnv`.

    `reset(state, settle_steps=0)` equals a new reference environment after `seed(seed)`, `reset()` and
    `set_init_state(state)`. Several simulations share one model; each has its own `MjData`. Not thread-safe by itself,
    but steps of different simulations run in parallel in threads.

    Raises:
        UserError: The installed MuJoCo is not the pinned one, or the task's model cannot be built.
    """

    def __init__(self, task: Task, seed: int = 0):
        compiled = compiled_task(task, seed)
        self.task = task
        self.seed = seed
        self.model = compiled.model
        self.data = mujoco.MjData(compiled.model)
        self._compiled = compiled
        self._indices = _indices(compiled.robot)
        self._physics = _physics(self.model, self.data)
        self._arm = _arm_state()
        self._sensors = _sensors(self.model.nq)
        self._site_rgba = compiled.snapshot["site_rgba"].copy()
        self._sampled_site_rgba = self._site_rgba.copy()
        self.reset(settle_steps=0)

    @property
    def qpos(self) -> np.ndarray:
        """Joint positions [nq], a copy."""
        return self.data.qpos.copy()

    @property
    def qvel(self) -> np.ndarray:
        """Joint velocities [nv], a copy."""
        return self.data.qvel.copy()

    @property
    def goal(self) -> tuple[GoalTest, ...]:
        """The tests that success is the conjunction of."""
        return self._compiled.goal

    def reset(self, init_state: np.ndarray | None = None, settle_steps: int = SETTLE_STEPS) -> None:
        """Start an episode.

        Args:
            init_state: time, qpos, qvel as one float64 array; None keeps the placement drawn with the seed.
            settle_steps: Control steps to stand still afterwards while objects come to rest.

        Raises:
            UserError: The state's size does not fit the task, or it holds NaN or infinity.
        """
        if init_state is not None:
            init_state = self.checked_state(init_state)
        self._restore_snapshot()
        if init_state is not None:
            nq = self.model.nq
            self.data.time = init_state[0]
            self.data.qpos[:] = init_state[1 : 1 + nq]
            self.data.qvel[:] = init_state[1 + nq :]
            mujoco.mj_forward(self.model, self.data)
            self._toggle_sites()
            self._observe_now()
        for _ in range(settle_steps):
            self.step(SETTLE_ACTION)

    def step(self, action: np.ndarray) -> bool:
        """Advance by one control step (50 ms) and return whether the goal is reached.

        Args:
            action: 7 numbers in [-1, 1]: translation, rotation (axis-angle), gripper (-1 opens, 1 closes). Values
                beyond are clipped, as the reference does.

        Raises:
            UserError: The shape is wrong or a number is NaN or infinite.
        """
        return self._step(checked_actions(action, (ACTION_DIM,)))

    def step_chunk(self, actions: np.ndarray) -> np.ndarray:
        """Execute `actions` [C, 7] one after the other; returns success [C] (bool) after each. Does not stop early.

        Raises:
            UserError: The shape is wrong or a number is NaN or infinite.
        """
        actions = checked_actions(actions, (None, ACTION_DIM))
        return np.array([self._step(action) for action in actions], dtype=bool)

    def success(self) -> bool:
        """Whether the goal holds now."""
        return goal_reached(self._compiled.goal, self.model, self.data)

    def proprioception(self) -> dict[str, np.ndarray]:
        """The robot part of the reference's observation, float64, with its names.

        `robot0_eef_pos` [3] m, `robot0_eef_quat` [4] xyzw, `robot0_gripper_qpos` [2] m.
        """
        return {
            "robot0_eef_pos": self._sensors.eef_pos.copy(),
            "robot0_eef_quat": self._sensors.eef_quat.copy(),
            "robot0_gripper_qpos": self._sensors.gripper_qpos.copy(),
        }

    def state(self) -> np.ndarray:
        """The policy's state, float32 [8]: gripper position (m), orientation as axis-angle (rad), finger joints (m)."""
        sensors = self._sensors
        return np.concatenate([sensors.eef_pos, axis_angle(sensors.eef_quat), sensors.gripper_qpos]).astype(np.float32)

    def render_state(self) -> RenderState:
        """What a renderer needs to show what the reference's last observation shows."""
        return RenderState(
            qpos=self._sensors.qpos.copy(),
            body_pos=self._compiled.snapshot["body_pos"],
            body_quat=self._compiled.snapshot["body_quat"],
            site_rgba=self._sampled_site_rgba.copy(),
        )

    def _step(self, action: np.ndarray) -> bool:
        clipped = np.clip(action[:6], -1.0, 1.0) * controller.INPUT_SCALE
        # Pictures are taken before the step's end, so they still show the stove as the last step left it.
        self._sampled_site_rgba[:] = self._site_rgba
        controller.control_step(
            self._physics,
            self._indices,
            self._arm,
            self._sensors,
            clipped[:3],
            controller.rotation_quaternion(clipped[3:]),
            bool(clipped[3:].any()),
            float(np.sign(action[6])),
        )
        self._toggle_sites()
        return self.success()

    def _restore_snapshot(self) -> None:
        """Put everything back to where the reference is right after its reset."""
        snapshot = self._compiled.snapshot
        data, arm = self.data, self._arm
        mujoco.mj_resetData(self.model, data)
        data.time = float(snapshot["time"])
        data.qpos[:] = snapshot["qpos"]
        data.qvel[:] = snapshot["qvel"]
        data.ctrl[:] = snapshot["ctrl"]
        mujoco.mj_forward(self.model, data)
        data.qacc_warmstart[:] = snapshot["qacc_warmstart"]
        for name in _SNAPSHOT_FIELDS:
            getattr(arm, name)[...] = snapshot[name]
        arm.gripper[:] = 0.0
        # The reference's controller looked at the robot while resetting and does not look again before the first
        # substep, whatever init state was set in between.
        arm.stale[0] = True
        self._site_rgba[:] = snapshot["site_rgba"]
        self._sensors.clock[0] = 0.0
        self._observe_now()

    def _observe_now(self) -> None:
        """A forced update of the reference's observables, which also advances their clock."""
        controller.read_sensors(self._physics, self._indices, self._sensors)
        self._sensors.qpos[:] = self.data.qpos
        self._sensors.clock[0] += controller.PHYSICS_TIMESTEP
        self._sensors.sampled[0] = True
        self._sampled_site_rgba[:] = self._site_rgba

    def _toggle_sites(self) -> None:
        for toggled in self._compiled.toggled_sites:
            colour = self._site_rgba[toggled.site]
            if (colour[3] > 0) != toggled.lit.holds(self.model, self.data):
                colour[3] = 1 - colour[3]

    def checked_state(self, state: np.ndarray) -> np.ndarray:
        """The init state as float64 [1 + nq + nv].

        Raises:
            UserError: Its size does not fit the task, or it holds NaN or infinity.
        """
        state = _as_numbers(state, f"init state for {self.task.suite} task {self.task.task_id}")
        expected = 1 + self.model.nq + self.model.nv
        if state.shape != (expected,):
            raise UserError(
                f"init state of shape {state.shape} for {self.task.suite} task {self.task.task_id}: expected "
                f"({expected},) (time, qpos, qvel); take it from this task's init states"
            )
        if not np.isfinite(state).all():
            raise UserError(f"init state for {self.task.suite} task {self.task.task_id} holds NaN or infinity")
        return state


def checked_actions(actions: np.ndarray, shape: tuple[int | None, ...]) -> np.ndarray:
    """Actions as float64 of `shape`, whose last entry is `ACTION_DIM`; None stands for any length but 0.

    Raises:
        UserError: The shape is wrong or a number is NaN or infinite.
    """
    actions = _as_numbers(actions, "action")
    matches = len(shape) == actions.ndim and all(
        size == wanted if wanted else size > 0 for size, wanted in zip(actions.shape, shape, strict=True)
    )
    if not matches:
        expected = ", ".join("C" if size is None else str(size) for size in shape)
        raise UserError(f"action of shape {actions.shape}: expected ({expected}), 7 numbers per control step")
    if not np.isfinite(actions).all():
        raise UserError("action holds NaN or infinity: expected 7 finite numbers in [-1, 1] per control step")
    return actions


def _as_numbers(values: object, name: str) -> np.ndarray:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: expected an array of numbers ({error})") from None


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Quaternion [4] xyzw to axis-angle [3] (rad, angle up to 2 pi), zero if w is 1 or -1.

    Formula of the policy state in openpi's LIBERO evaluation: 2 acos(w) (x, y, z) / sqrt(1 - w^2).
    """
    w = min(max(quaternion[3], -1.0), 1.0)
    sine = np.sqrt(1.0 - w * w)
    if sine == 0.0:
        return np.zeros(3)
    return quaternion[:3] * 2.0 * np.arccos(w) / sine


def _indices(robot: dict[str, Any]) -> controller.Indices:
    arrays = {name: np.array(value, np.int64) for name, value in robot.items() if isinstance(value, list)}
    return controller.Indices(grip_site=robot["grip_site"], hand_body=robot["hand_body"], **arrays)


def _physics(model: mujoco.MjModel, data: mujoco.MjData) -> controller.Physics:
    jacp, jacr, dense = np.zeros((3, model.nv)), np.zeros((3, model.nv)), np.zeros((model.nv, model.nv))
    return controller.Physics(
        model=model._address,
        data=data._address,
        jacp_address=jacp.ctypes.data,
        jacr_address=jacr.ctypes.data,
        dense_address=dense.ctypes.data,
        qm_address=data.qM.ctypes.data,
        jacp=jacp,
        jacr=jacr,
        dense=dense,
        qpos=data.qpos,
        qvel=data.qvel,
        ctrl=data.ctrl,
        ctrl_range=model.actuator_ctrlrange,
        bias=data.qfrc_bias,
        site_xpos=data.site_xpos,
        site_xmat=data.site_xmat,
        body_xquat=data.xquat,
    )


def _arm_state() -> controller.ArmState:
    shapes = {
        "ee_pos": 3, "ee_mat": (3, 3), "ee_velocity": 6, "joint_pos": 7, "joint_vel": 7, "jacobian": (6, 7),
        "mass_matrix": (7, 7), "initial_joint": 7, "goal_pos": 3, "goal_mat": (3, 3), "gripper": 2,
    }  # fmt: skip
    return controller.ArmState(**{name: np.zeros(shape) for name, shape in shapes.items()}, stale=np.ones(1, bool))


def _sensors(nq: int) -> controller.Sensors:
    return controller.Sensors(np.zeros(3), np.zeros(4), np.zeros(2), np.zeros(nq), np.zeros(1), np.zeros(1, bool))
