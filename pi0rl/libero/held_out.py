"""Makes the held-out init states: `python -m pi0rl.libero.held_out --suite libero_object`.

They are distributed as the official ones and share none with them. Where LIBERO ships states that its pruning left
unused (Spatial, Long and 90), those are taken; otherwise the reference environment samples the BDDL problem, one seed
per state. Like the official ones they are not settled yet: an episode's settling steps do that. A state is kept if it
settles in our simulation as well as the official ones do: every free object stays upright, close and at rest, and the
goal is not reached. Writes `pi0rl/libero/held_out/SUITE.npz`, one array per task name, always the same bytes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator

import mujoco
import numpy as np

from pi0rl.errors import UserError
from pi0rl.libero.compile import cache_directory
from pi0rl.libero.simulation import Simulation
from pi0rl.libero.suites import (
    HELD_OUT_DIR,
    Task,
    official_init_states,
    state_hash,
    suite_tasks,
    unpruned_init_states,
)

STATES_PER_TASK = 20
# Task t draws with the seeds from 100_000 * (t + 1) on; the official states were drawn unseeded.
_SEEDS_PER_TASK = 100_000
_MAX_SAMPLED = 10 * STATES_PER_TASK
# Settled for 0.5 s as in an evaluation, then watched for another 0.5 s.
_SETTLE_STEPS = 10
_NO_OP = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
# Always allowed: tilt (rad), slide (m), drift (m).
_CALM = np.array([np.deg2rad(15), 0.02, 0.005])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", required=True)
    suite = parser.parse_args().suite
    # Before LIBERO is imported: it asks for its data folder, and robosuite refuses some values.
    os.environ["LIBERO_CONFIG_PATH"] = str(cache_directory() / "libero" / "config")
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    states = {task.name: held_out_states(task) for task in suite_tasks(suite)}
    HELD_OUT_DIR.mkdir(exist_ok=True)
    temporary = HELD_OUT_DIR / f".{suite}.{os.getpid()}.npz"
    np.savez_compressed(temporary, **states)  # pyright: ignore[reportArgumentType]
    temporary.replace(HELD_OUT_DIR / f"{suite}.npz")


def held_out_states(task: Task) -> np.ndarray:
    """The first `STATES_PER_TASK` candidates that are new and settle well, float64 [n, state].

    Raises:
        UserError: Too few candidates pass.
    """
    simulation = Simulation(task, seed=0)
    allowed = _allowed_unrest(simulation)
    seen = {state_hash(state) for state in official_init_states(task)}
    accepted: list[np.ndarray] = []
    tried = 0
    for candidate in _candidates(task):
        if state_hash(candidate) in seen:
            continue
        seen.add(state_hash(candidate))
        tried += 1
        if (unrest(simulation, candidate) <= allowed).all():
            accepted.append(candidate)
        if len(accepted) == STATES_PER_TASK:
            states = np.stack(accepted)
            print(f"{task.suite} {task.task_id}: {tried} candidates, {_describe(simulation, states)}", flush=True)
            return states
    raise UserError(
        f"{task.suite} task {task.task_id}: {len(accepted)} of {tried} candidates settle well, "
        f"expected {STATES_PER_TASK}; is the pinned MuJoCo installed?"
    )


def unrest(simulation: Simulation, init_state: np.ndarray) -> np.ndarray:
    """How badly a state settles, over all free objects: tilt (rad) and slide (m) while settling, drift (m) afterwards.

    All infinite where the goal is reached without doing anything.
    """
    simulation.reset(init_state, settle_steps=0)
    start = _free_poses(simulation)
    simulation.reset(init_state, settle_steps=_SETTLE_STEPS)
    settled = _free_poses(simulation)
    reached = simulation.success() or simulation.step_chunk(np.tile(_NO_OP, (_SETTLE_STEPS, 1))).any()
    later = _free_poses(simulation)
    if reached:
        return np.full(3, np.inf)
    # Cosine of half the angle between two orientations, of either sign.
    half_angle = np.abs(np.einsum("ij,ij->i", start[:, 3:], settled[:, 3:])).clip(0, 1)
    tilt = 2 * np.arccos(half_angle)
    slide = np.linalg.norm(settled[:, :2] - start[:, :2], axis=1)
    drift = np.linalg.norm(later[:, :3] - settled[:, :3], axis=1)
    return np.array([tilt.max(), slide.max(), drift.max()])


def _allowed_unrest(simulation: Simulation) -> np.ndarray:
    """Small in general; where a task's official states settle worse (a bowl on a ramekin), half as much again."""
    official = [unrest(simulation, state) for state in official_init_states(simulation.task)[:STATES_PER_TASK]]
    return np.maximum(_CALM, 1.5 * np.median(official, axis=0))


def _candidates(task: Task) -> Iterator[np.ndarray]:
    unpruned = unpruned_init_states(task)
    if unpruned is not None:
        yield from unpruned
    from pi0rl.libero.build import reference_environment

    # The official states also vary the arm's joints, by normal noise of 0.02 rad (robosuite's default).
    environment = reference_environment(task.bddl_file, hard_reset=False, initialization_noise="default")
    first = _SEEDS_PER_TASK * (task.task_id + 1)
    for seed in range(first, first + _MAX_SAMPLED):
        environment.seed(seed)
        environment.reset()
        yield environment.get_sim_state()


def _free_poses(simulation: Simulation) -> np.ndarray:
    """Positions (m) and wxyz orientations of the objects with a free joint, float64 [n, 7]."""
    addresses = _free_addresses(simulation.model)
    return np.stack([simulation.qpos[address : address + 7] for address in addresses])


def _free_addresses(model: mujoco.MjModel) -> np.ndarray:
    return model.jnt_qposadr[model.jnt_type == mujoco.mjtJoint.mjJNT_FREE]


def _describe(simulation: Simulation, states: np.ndarray) -> str:
    """How far the states leave the box that the official states span, over all free objects."""
    columns = np.concatenate([address + 1 + np.arange(3) for address in _free_addresses(simulation.model)])
    official = official_init_states(simulation.task)[:, columns]
    ours = states[:, columns]
    beyond = np.maximum(ours.max(0) - official.max(0), official.min(0) - ours.min(0)).max()
    width = (np.ptp(ours, 0).max(), np.ptp(official, 0).max())
    return f"range {width[0] * 1e3:.1f} mm (official {width[1] * 1e3:.1f}), at most {beyond * 1e3:.1f} mm beyond"


if __name__ == "__main__":
    main()
