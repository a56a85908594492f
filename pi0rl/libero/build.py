"""Builds what the simulator needs for one task from the reference environment.

Runs as a program of its own (`python -m pi0rl.libero.build BDDL_FILE DIRECTORY SEED...`): importing robosuite changes
environment variables and drawing fixture poses uses numpy's global generator, neither of which belongs in the caller.
Writes `physics.mjb`, `full.xml` and `task.json` once, and `seed_N.npz` for each seed.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import math
import os
import sys
import types
from pathlib import Path
from typing import Any

import mujoco
import numpy as np

from pi0rl.libero import goal as goals
from pi0rl.libero.controller import DAMPING_GAIN, INPUT_SCALE, POSITION_GAIN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bddl_file", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("seeds", type=int, nargs="+")
    arguments = parser.parse_args()
    environment = reference_environment(arguments.bddl_file)
    directory: Path = arguments.directory
    if not (directory / "task.json").exists():
        write_task(environment, directory)
    write_seeds(environment, directory, arguments.seeds)


def reference_environment(
    bddl_file: Path,
    hard_reset: bool = True,
    initialization_noise: str | None = None,
) -> Any:
    """LIBERO's own environment, not reset yet: the physics of `OffScreenRenderEnv` without its pictures.

    Args:
        bddl_file: The problem.
        hard_reset: Whether each reset builds the scene anew (the reference's default) or only draws it again.
        initialization_noise: "default" disturbs the arm's first pose; LIBERO does not.
    """
    configure_robosuite()
    import robosuite.environments.base
    from libero.libero.envs.env_wrapper import ControlEnv

    robosuite.environments.base.MjRenderContextOffscreen = _NoPictures
    return ControlEnv(
        str(bddl_file),
        has_offscreen_renderer=True,
        use_camera_obs=False,
        hard_reset=hard_reset,
        initialization_noise=initialization_noise,
    )


class _NoPictures:
    """Stands for robosuite's render context and needs no GL.

    Making the original computes the forward dynamics once more, which moves the solver's warm start in its last bits
    and with it every trajectory that follows.
    """

    offscreen = True

    def __init__(self, sim: Any, device_id: int):
        sim.forward()
        sim.add_render_context(self)
        self.vopt = mujoco.MjvOption()


def configure_robosuite() -> None:
    """Load robosuite's settings before robosuite itself and change what can stop its import."""
    spec = importlib.util.find_spec("robosuite")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0]) / "macros.py"
    macros_spec = importlib.util.spec_from_file_location("robosuite.macros", path)
    assert macros_spec is not None
    assert macros_spec.loader is not None
    macros: Any = importlib.util.module_from_spec(macros_spec)
    macros_spec.loader.exec_module(macros)
    sys.modules["robosuite.macros"] = macros
    # A user's own settings change nothing here, and their absence is no reason for a warning.
    sys.modules["robosuite.macros_private"] = types.ModuleType("robosuite.macros_private")
    # /tmp/robosuite.log cannot be opened where another user has made it.
    macros.FILE_LOGGING_LEVEL = None
    try:
        ctypes.CDLL("libEGL.so.1")
    except OSError:
        # Without EGL the import would fail. Whoever asks LIBERO for its models needs no pictures of it.
        macros.MUJOCO_GPU_RENDERING = False
        os.environ.setdefault("MUJOCO_GL", "disable")


def write_task(environment: Any, directory: Path) -> None:
    """Write the physics-only model, the full model's XML and the indices, all independent of the seed."""
    xml = environment.env.model.get_xml()
    physics = physics_only(xml, environment.env.sim.model._model)
    _write_atomically(directory / "full.xml", xml.encode())
    binary = np.empty(mujoco.mj_sizeModel(physics), np.uint8)
    mujoco.mj_saveModel(physics, None, binary)
    _write_atomically(directory / "physics.mjb", binary.tobytes())
    # Last, since its presence says that the task is complete.
    _write_atomically(directory / "task.json", json.dumps(_description(environment, physics), indent=1).encode())


def physics_only(xml: str, full: mujoco.MjModel) -> mujoco.MjModel:
    """The model without anything that cannot touch: same bodies, joints and sites, same bits in every trajectory."""
    spec = mujoco.MjSpec.from_string(xml)
    for body in spec.bodies[1:]:
        source = full.body(body.name)
        body.explicitinertial = True
        body.mass, body.ipos, body.iquat, body.inertia = source.mass[0], source.ipos, source.iquat, source.inertia
    spec.compiler.inertiafromgeom = mujoco.mjtInertiaFromGeom.mjINERTIAFROMGEOM_FALSE
    collides = (full.geom_contype != 0) | (full.geom_conaffinity != 0)
    for geom, keep in zip(list(spec.geoms), collides, strict=True):
        if keep:
            geom.material = ""
        else:
            geom.delete()
    used_meshes = {geom.meshname for geom in spec.geoms}
    for element in [*spec.sensors, *spec.cameras, *spec.lights, *spec.materials, *spec.textures]:
        element.delete()
    for mesh in list(spec.meshes):
        if mesh.name not in used_meshes:
            mesh.delete()
    physics = spec.compile()
    _copy_constants(full, physics, np.flatnonzero(collides))
    return physics


def _copy_constants(full: mujoco.MjModel, physics: mujoco.MjModel, kept: np.ndarray) -> None:
    """Take every number that the dynamics read from the full model, so that no rounding of the compiler is left."""
    groups = ("body_", "jnt_", "dof_", "site_", "actuator_", "tendon_", "eq_", "qpos", "geom_")
    structural = ("body_geom", "body_bvh", "geom_dataid", "geom_matid", "geom_plugin", "site_matid")
    per_seed = ("body_pos", "body_quat", "site_rgba")
    for name in dir(full):
        if not name.startswith(groups) or name.startswith(structural) or name in per_seed:
            continue
        value = getattr(full, name)
        if isinstance(value, np.ndarray) and value.size:
            getattr(physics, name)[:] = value[kept] if name.startswith("geom_") else value
    physics.stat.meaninertia = full.stat.meaninertia


def write_seeds(environment: Any, directory: Path, seeds: list[int]) -> None:
    """Write the state right after `seed(s); reset()` of a new reference environment, for each seed."""
    base = environment.env
    initializers = list(base.object_property_initializers)
    for seed in seeds:
        # Each reset of the reference appends the initializers of open and closed joints once more, and every entry
        # draws from the generator; a new environment's first reset therefore starts from one set.
        base.object_property_initializers = list(initializers)
        environment.seed(seed)
        environment.reset()
        path = directory / f"seed_{seed}.npz"
        temporary = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(temporary, allow_pickle=False, **_snapshot(base))
        temporary.replace(path)


def _snapshot(base: Any) -> dict[str, np.ndarray]:
    data, model, arm = base.sim.data._data, base.sim.model._model, base.robots[0].controller
    return {
        "time": np.array(data.time),
        "qpos": data.qpos.copy(),
        "qvel": data.qvel.copy(),
        "ctrl": data.ctrl.copy(),
        "qacc_warmstart": data.qacc_warmstart.copy(),
        "body_pos": model.body_pos.copy(),
        "body_quat": model.body_quat.copy(),
        "site_rgba": model.site_rgba.copy(),
        "ee_pos": arm.ee_pos,
        "ee_mat": arm.ee_ori_mat,
        "ee_velocity": np.concatenate([arm.ee_pos_vel, arm.ee_ori_vel]),
        "joint_pos": arm.joint_pos,
        "joint_vel": arm.joint_vel,
        "jacobian": np.ascontiguousarray(arm.J_full),
        "mass_matrix": np.ascontiguousarray(arm.mass_matrix),
        "initial_joint": arm.initial_joint,
        "goal_pos": arm.goal_pos,
        "goal_mat": arm.goal_ori,
    }


def _description(environment: Any, physics: mujoco.MjModel) -> dict[str, Any]:
    base = environment.env
    robot = base.robots[0]
    _check_controller(robot.controller)
    return {
        "grip_site": physics.site(robot.controller.eef_name).id,
        "hand_body": physics.body(robot.robot_model.eef_name).id,
        "arm_qpos": [int(index) for index in robot._ref_joint_pos_indexes],
        "arm_dofs": [int(index) for index in robot._ref_joint_vel_indexes],
        "arm_actuators": [int(index) for index in robot._ref_joint_actuator_indexes],
        "gripper_qpos": [int(index) for index in robot._ref_gripper_joint_pos_indexes],
        "gripper_actuators": [int(index) for index in robot._ref_joint_gripper_actuator_indexes],
        "goal": goals.goal_to_json(tuple(_test(base, physics, state) for state in base.parsed_problem["goal_state"])),
        "toggled_sites": _toggled_sites(base, physics),
    }


def _check_controller(arm: Any) -> None:
    """The gains are constants of our controller: refuse to build if the reference uses others."""
    expected = {"kp": POSITION_GAIN, "kd": DAMPING_GAIN}
    if any(not np.all(getattr(arm, name) == value) for name, value in expected.items()):
        raise ValueError(f"the reference controller's gains are not {expected}: is robosuite 1.4.0 installed?")
    if not np.array_equal(abs(arm.output_max - arm.output_min) / abs(arm.input_max - arm.input_min), INPUT_SCALE):
        raise ValueError(f"the reference controller's action scale is not {INPUT_SCALE}: is robosuite 1.4.0 installed?")


def _test(base: Any, physics: mujoco.MjModel, state: list[str]) -> goals.GoalTest:
    predicate, arguments = state[0].lower(), [base.object_states_dict[name] for name in state[1:]]
    if predicate in ("open", "close", "turnon", "turnoff"):
        return _joint_test(base, physics, predicate, arguments[0])
    subject, place = arguments
    body = physics.body(base.get_object(subject.object_name).root_body).id
    if predicate == "in" and place.object_state_type == "site":
        region = base.object_sites_dict[place.object_name]
        return goals.InSite(physics.site(place.object_name).id, _size(region), body)
    if predicate == "on" and place.object_state_type == "site":
        owner = base.get_object(place.parent_name)
        return goals.OnSite(
            site=physics.site(place.object_name).id,
            size=_size(base.object_sites_dict[place.object_name]),
            body=body,
            owner_geoms=() if owner is None else _contact_geoms(physics, owner),
            object_geoms=_contact_geoms(physics, base.get_object(subject.object_name)),
        )
    if predicate == "on":
        lower, upper = base.get_object(place.object_name), base.get_object(subject.object_name)
        return goals.OnObject(
            lower_body=physics.body(lower.root_body).id,
            upper_body=body,
            lower_geoms=_contact_geoms(physics, lower),
            upper_geoms=_contact_geoms(physics, upper),
        )
    raise ValueError(f"goal predicate {state} is not one that LIBERO's environments evaluate")


def _joint_test(base: Any, physics: mujoco.MjModel, predicate: str, subject: Any) -> goals.JointTest:
    if subject.object_state_type == "site":
        joints, owner = base.object_sites_dict[subject.object_name].joints, base.get_object(subject.parent_name)
    else:
        joints, owner = base.get_object(subject.object_name).joints, base.get_object(subject.object_name)
    method = {"open": "is_open", "close": "is_close", "turnon": "turn_on", "turnoff": "turn_off"}[predicate]
    key = {"turnon": "default_turnon_ranges", "turnoff": "default_turnoff_ranges"}.get(
        predicate, f"default_{predicate}_ranges"
    )
    threshold, above, inclusive = _threshold(getattr(owner, method), owner.object_properties["articulation"][key])
    addresses = tuple(int(physics.joint(joint).qposadr[0]) for joint in joints)
    return goals.JointTest(addresses, threshold, above, inclusive, every=predicate in ("close", "turnoff"))


def _threshold(test: Any, candidates: list[float]) -> tuple[float, bool, bool]:
    """Where a one-sided joint test flips: threshold, whether larger values pass, whether it passes itself."""
    for value in candidates:
        below, above = test(math.nextafter(value, -math.inf)), test(math.nextafter(value, math.inf))
        if below != above:
            return float(value), bool(above), bool(test(value))
    raise ValueError(f"joint test {test} does not flip at any of {candidates}")


def _toggled_sites(base: Any, physics: mujoco.MjModel) -> list[dict[str, Any]]:
    """Sites whose visibility follows a joint (a stove's burner glows while it is on)."""
    toggled = []
    for name in dict.fromkeys(base.visualization_sites_list):
        test = _joint_test(base, physics, "turnon", base.object_states_dict[name])
        for site_name, _ in base.get_object(name).object_properties["vis_site_names"].values():
            toggled.append({"site": physics.site(site_name).id, "lit": goals.goal_to_json((test,))[0]})
    return toggled


def _size(region: Any) -> tuple[float, float, float]:
    x, y, z = (float(value) for value in region.size)
    return x, y, z


def _contact_geoms(physics: mujoco.MjModel, model: Any) -> tuple[int, ...]:
    names = (mujoco.mj_name2id(physics, mujoco.mjtObj.mjOBJ_GEOM, name) for name in model.contact_geoms if name)
    return tuple(sorted({index for index in names if index >= 0}))


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


if __name__ == "__main__":
    main()
