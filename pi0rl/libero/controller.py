"""One control step as a single compiled function: 25 physics substeps under operational-space control.

The arithmetic is that of robosuite 1.4.0's OSC_POSE controller (Khatib 1987: torques J^T Lambda F plus a null-space
posture term) as LIBERO configures it, in the same order and with the same array layouts, because the result has to
agree with the reference in every bit. The function calls libmujoco by symbol name, holds no GIL, and is cached on disk.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import llvmlite.binding
import mujoco
import numba
import numpy as np
from numba import types

POSITION_GAIN = 150.0
DAMPING_GAIN = 2 * np.sqrt(150.0)
# Action units to metres and radians.
INPUT_SCALE = np.array([0.05, 0.05, 0.05, 0.5, 0.5, 0.5])
POSTURE_GAIN = 10.0
SUBSTEPS = 25
PHYSICS_TIMESTEP = 0.002
CONTROL_TIMESTEP = 1.0 / 20
# How far the gripper command moves towards open or closed per substep.
GRIPPER_SPEED = 0.01
_EPSILON = np.finfo(float).eps * 4.0

ARM_JOINTS = 7

# Named symbols, unlike function pointers, leave the compiled code valid for other processes.
llvmlite.binding.load_library_permanently(str(Path(mujoco.__file__).parent / f"libmujoco.so.{mujoco.__version__}"))
_pointer = types.intp
_step1 = types.ExternalFunction("mj_step1", types.void(_pointer, _pointer))
_step2 = types.ExternalFunction("mj_step2", types.void(_pointer, _pointer))
_fwd_actuation = types.ExternalFunction("mj_fwdActuation", types.void(_pointer, _pointer))
_fwd_acceleration = types.ExternalFunction("mj_fwdAcceleration", types.void(_pointer, _pointer))
_fwd_constraint = types.ExternalFunction("mj_fwdConstraint", types.void(_pointer, _pointer))
_jac_site = types.ExternalFunction("mj_jacSite", types.void(_pointer, _pointer, _pointer, _pointer, types.int32))
_full_m = types.ExternalFunction("mj_fullM", types.void(_pointer, _pointer, _pointer))


class Indices(NamedTuple):
    """Where the robot is in the model's arrays (int64)."""

    grip_site: int
    hand_body: int
    arm_qpos: np.ndarray
    arm_dofs: np.ndarray
    arm_actuators: np.ndarray
    gripper_qpos: np.ndarray
    gripper_actuators: np.ndarray


class Physics(NamedTuple):
    """Addresses of MjModel, MjData and scratch buffers, and views of MjData's arrays."""

    model: int
    data: int
    jacp_address: int
    jacr_address: int
    dense_address: int
    qm_address: int
    jacp: np.ndarray  # [3, nv]
    jacr: np.ndarray  # [3, nv]
    dense: np.ndarray  # [nv, nv]
    qpos: np.ndarray
    qvel: np.ndarray
    ctrl: np.ndarray
    ctrl_range: np.ndarray
    bias: np.ndarray
    site_xpos: np.ndarray
    site_xmat: np.ndarray
    body_xquat: np.ndarray


class ArmState(NamedTuple):
    """What the controller remembers between substeps; the kernel writes into these arrays."""

    ee_pos: np.ndarray  # [3]
    ee_mat: np.ndarray  # [3, 3]
    ee_velocity: np.ndarray  # [6]
    joint_pos: np.ndarray  # [7]
    joint_vel: np.ndarray  # [7]
    jacobian: np.ndarray  # [6, 7]
    mass_matrix: np.ndarray  # [7, 7]
    initial_joint: np.ndarray  # [7]
    goal_pos: np.ndarray  # [3]
    goal_mat: np.ndarray  # [3, 3]
    gripper: np.ndarray  # [2] position of the gripper command in [-1, 1]
    stale: np.ndarray  # [1] bool: the next substep must not look at the robot (quirk of a reset)


class Sensors(NamedTuple):
    """The last sample of the observables, and the clock that decides when they are sampled."""

    eef_pos: np.ndarray  # [3]
    eef_quat: np.ndarray  # [4] xyzw
    gripper_qpos: np.ndarray  # [2]
    qpos: np.ndarray  # [nq] the pose to which site and camera frames of this sample belong
    clock: np.ndarray  # [1] s
    sampled: np.ndarray  # [1] bool


def rotation_quaternion(rotation: np.ndarray) -> np.ndarray:
    """Axis-angle [3] (rad) to a quaternion [4] xyzw.

    Plain numpy like the reference: its sine can differ from libm's, which compiled code would call, in the last bit.
    """
    angle = np.linalg.norm(rotation)
    if math.isclose(angle, 0.0):
        return np.array([0.0, 0.0, 0.0, 1.0])
    quaternion = np.zeros(4)
    quaternion[3] = np.cos(angle / 2.0)
    quaternion[:3] = rotation / angle * np.sin(angle / 2.0)
    return quaternion


@numba.njit(cache=True, nogil=True)
def control_step(
    physics: Physics,
    indices: Indices,
    arm: ArmState,
    sensors: Sensors,
    translation: np.ndarray,
    quaternion: np.ndarray,
    rotates: bool,
    gripper_direction: float,
) -> None:
    """Advance the simulation by one control step (50 ms).

    Args:
        physics, indices: Where to find everything.
        arm, sensors: State that is read and updated.
        translation: Wanted displacement of the gripper [3], m.
        quaternion: Wanted rotation [4] xyzw in the world frame.
        rotates: False if the rotation action is exactly zero: the orientation goal then stays as it was.
        gripper_direction: -1 opens, 1 closes, 0 keeps.
    """
    for substep in range(SUBSTEPS):
        # The reference runs the full forward dynamics three times here. Positions and velocities come out the same,
        # but at this MuJoCo version every constraint solve moves the warm start of the next, so each must happen.
        _step1(physics.model, physics.data)
        _fwd_actuation(physics.model, physics.data)
        _fwd_acceleration(physics.model, physics.data)
        _fwd_constraint(physics.model, physics.data)
        if arm.stale[0]:
            arm.stale[0] = False
        else:
            _fwd_constraint(physics.model, physics.data)
            _observe_arm(physics, indices, arm)
        if substep == 0:
            if rotates:
                arm.goal_mat[:] = np.dot(_rotation_matrix(quaternion), arm.ee_mat)
            arm.goal_pos[:] = arm.ee_pos + translation
        torques = _torques(physics, indices, arm)
        for joint in range(ARM_JOINTS):
            actuator = indices.arm_actuators[joint]
            low, high = physics.ctrl_range[actuator, 0], physics.ctrl_range[actuator, 1]
            physics.ctrl[actuator] = min(max(torques[joint], low), high)
        _command_gripper(physics, indices, arm, gripper_direction)
        _sample(physics, indices, sensors)


@numba.njit(cache=True, nogil=True)
def _observe_arm(physics, indices, arm):
    site = indices.grip_site
    _jac_site(physics.model, physics.data, physics.jacp_address, physics.jacr_address, site)
    _full_m(physics.model, physics.dense_address, physics.qm_address)
    arm.ee_pos[:] = physics.site_xpos[site]
    arm.ee_mat[:] = physics.site_xmat[site].reshape(3, 3)
    arm.ee_velocity[:3] = np.dot(physics.jacp, physics.qvel)
    arm.ee_velocity[3:] = np.dot(physics.jacr, physics.qvel)
    for i in range(ARM_JOINTS):
        dof = indices.arm_dofs[i]
        arm.joint_pos[i] = physics.qpos[indices.arm_qpos[i]]
        arm.joint_vel[i] = physics.qvel[dof]
        for j in range(3):
            arm.jacobian[j, i] = physics.jacp[j, dof]
            arm.jacobian[3 + j, i] = physics.jacr[j, dof]
        for j in range(ARM_JOINTS):
            arm.mass_matrix[i, j] = physics.dense[dof, indices.arm_dofs[j]]


@numba.njit(cache=True, nogil=True)
def _torques(physics, indices, arm):
    """Joint torques [7] (N m) that pull the gripper to its goal, before clipping."""
    # The reference's matrices are Fortran-ordered, and BLAS sums in another order otherwise.
    jacobian = np.ascontiguousarray(arm.jacobian.T).T
    jac_pos = np.ascontiguousarray(arm.jacobian[:3].T).T
    jac_rot = np.ascontiguousarray(arm.jacobian[3:].T).T
    mass = np.ascontiguousarray(arm.mass_matrix.T).T

    position_error = arm.goal_pos - arm.ee_pos
    force = position_error * POSITION_GAIN + -arm.ee_velocity[:3] * DAMPING_GAIN
    torque = _orientation_error(arm.goal_mat, arm.ee_mat) * POSITION_GAIN + -arm.ee_velocity[3:] * DAMPING_GAIN

    mass_inv = np.linalg.inv(mass)
    lambda_full = np.linalg.pinv(np.dot(np.dot(jacobian, mass_inv), jacobian.T))
    lambda_pos = np.linalg.pinv(np.dot(np.dot(jac_pos, mass_inv), jac_pos.T))
    lambda_rot = np.linalg.pinv(np.dot(np.dot(jac_rot, mass_inv), jac_rot.T))
    wrench = np.empty(6)
    wrench[:3] = np.dot(lambda_pos, force)
    wrench[3:] = np.dot(lambda_rot, torque)

    dynamically_consistent_inverse = np.dot(np.dot(mass_inv, jacobian.T), lambda_full)
    nullspace = np.eye(ARM_JOINTS) - np.dot(dynamically_consistent_inverse, jacobian)
    damping = np.sqrt(POSTURE_GAIN) * 2
    posture = np.dot(mass, POSTURE_GAIN * (arm.initial_joint - arm.joint_pos) - damping * arm.joint_vel)

    torques = np.dot(jacobian.T, wrench)
    for i in range(ARM_JOINTS):
        torques[i] += physics.bias[indices.arm_dofs[i]]
    return torques + np.dot(nullspace.T, posture)


@numba.njit(cache=True, nogil=True)
def _orientation_error(desired, current):
    """Small-angle rotation vector [3] from `current` to `desired` (3x3 each)."""
    error = np.zeros(3)
    for axis in range(3):
        j, k = (axis + 1) % 3, (axis + 2) % 3
        total = current[j, 0] * desired[k, 0] - current[k, 0] * desired[j, 0]
        total = total + (current[j, 1] * desired[k, 1] - current[k, 1] * desired[j, 1])
        total = total + (current[j, 2] * desired[k, 2] - current[k, 2] * desired[j, 2])
        error[axis] = 0.5 * total
    return error


@numba.njit(cache=True, nogil=True)
def _rotation_matrix(quaternion):
    """Rotation matrix [3, 3] of a quaternion xyzw, in single precision where the reference uses it."""
    q = np.empty(4, np.float32)
    q[0], q[1], q[2], q[3] = quaternion[3], quaternion[0], quaternion[1], quaternion[2]
    squared = np.dot(q, q)
    if squared < _EPSILON:
        return np.eye(3)
    q *= math.sqrt(2.0 / squared)
    p = np.outer(q, q)
    return np.array(
        [
            [1.0 - p[2, 2] - p[3, 3], p[1, 2] - p[3, 0], p[1, 3] + p[2, 0]],
            [p[1, 2] + p[3, 0], 1.0 - p[1, 1] - p[3, 3], p[2, 3] - p[1, 0]],
            [p[1, 3] - p[2, 0], p[2, 3] + p[1, 0], 1.0 - p[1, 1] - p[2, 2]],
        ]
    )


@numba.njit(cache=True, nogil=True)
def _command_gripper(physics, indices, arm, direction):
    for finger in range(2):
        sign = -1.0 if finger == 0 else 1.0
        arm.gripper[finger] = min(max(arm.gripper[finger] + sign * GRIPPER_SPEED * direction, -1.0), 1.0)
        actuator = indices.gripper_actuators[finger]
        low, high = physics.ctrl_range[actuator, 0], physics.ctrl_range[actuator, 1]
        physics.ctrl[actuator] = 0.5 * (high + low) + 0.5 * (high - low) * arm.gripper[finger]


@numba.njit(cache=True, nogil=True)
def _sample(physics, indices, sensors):
    """Finish the substep and take an observation if one is due.

    The reference's observables sample at 20 Hz on their own floating-point clock, which after a reset and a set init
    state strikes in substep 24 of 25. Frames are then those before the integration, joint positions those after it.
    """
    sensors.clock[0] += PHYSICS_TIMESTEP
    due = not sensors.sampled[0]
    if due:
        sensors.qpos[:] = physics.qpos
    _step2(physics.model, physics.data)
    if due:
        read_sensors(physics, indices, sensors)
        sensors.sampled[0] = True
    if sensors.clock[0] >= CONTROL_TIMESTEP:
        sensors.clock[0] %= CONTROL_TIMESTEP
        sensors.sampled[0] = False


@numba.njit(cache=True, nogil=True)
def read_sensors(physics: Physics, indices: Indices, sensors: Sensors) -> None:
    """Take what the reference observes from the current frames and joint positions (not `sensors.qpos`)."""
    sensors.eef_pos[:] = physics.site_xpos[indices.grip_site]
    quaternion = physics.body_xquat[indices.hand_body]
    for i in range(4):
        sensors.eef_quat[i] = quaternion[(i + 1) % 4]
    for i in range(2):
        sensors.gripper_qpos[i] = physics.qpos[indices.gripper_qpos[i]]
