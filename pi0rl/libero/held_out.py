"""Makes the held-out init states of the suites for which none ship, and the files that ship.

    python -m pi0rl.libero.held_out --suite libero_object

They are distributed as the official ones and share none with them. Where LIBERO ships states that its pruning left
unused (Spatial, Long and 90), those are taken; otherwise the reference environment samples the BDDL problem, one seed
per state. Like the official ones they are not settled yet: an episode's settling steps do that. A state is kept if it
settles in our simulation as well as the official ones do: every free object stays upright, close and at rest, and the
goal is not reached. The command writes `pi0rl/libero/held_out/SUITE.npz`, one array per task name, always the same
bytes; the other suites' states are made task by task when they are first asked for, into the cache.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mujoco
import numpy as np

from pi0rl.errors import UserError
from pi0rl.libero.compile import prepare_task, reference_variables
from pi0rl.libero.simulation import Simulation
from pi0rl.libero.suites import (
    HELD_OUT_DIR,
    Task,
    official_init_states,
    state_hash,
    suite_tasks,
    unpruned_init_states,
)
from pi0rl.libero.suites import task as find_task

STATES_PER_TASK = 20
# Raise when other states would be made of the same task.
_FORMAT = 1
# Task t draws with the seeds from 100_000 * (t + 1) on; the official states were drawn unseeded.
_SEEDS_PER_TASK = 100_000
_MAX_SAMPLED = 10 * STATES_PER_TASK
# Settled for 0.5 s as in an evaluation, then watched for another 0.5 s.
_SETTLE_STEPS = 10
_NO_OP = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
# Always allowed: tilt (rad), slide (m), drift (m).
_CALM = np.array([np.deg2rad(15), 0.02, 0.005])


def cached_held_out_file(task: Task) -> Path:
    """The file with a task's held-out states, made on the first call on this machine (half a minute).

    Raises:
        UserError: Too few candidates pass, or the task cannot be built.
    """
    directory = prepare_task(task, [0])
    path = directory / f"held_out_v{_FORMAT}.npz"
    if path.exists():
        return path
    # One process makes it; the others wait and find the file.
    with (directory / ".held_out_lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _make(task, path)
    return path


def _make(task: Task, path: Path) -> None:
    """A program of its own, since the reference environment changes what it is imported into."""
    program = "from pi0rl.libero.held_out import main; main()"
    arguments = ["--suite", task.suite, "--task-id", str(task.task_id), "--output", str(path)]
    command = [sys.executable, "-c", program, *arguments]
    result = subprocess.run(
        command, env=reference_variables(), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if result.returncode:
        reason = (result.stderr.strip() or f"ended with {result.returncode}").splitlines()[-1]
        raise UserError(f"no held-out init states for {task.suite} task {task.task_id}: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", required=True)
    parser.add_argument("--task-id", type=int, help="only this task (default: all)")
    parser.add_argument("--output", type=Path, help="npz file to write (default: the one that ships with pi0rl)")
    options = parser.parse_args()
    # Before LIBERO is imported: it asks for its data folder, and robosuite refuses some values.
    os.environ["LIBERO_CONFIG_PATH"] = reference_variables()["LIBERO_CONFIG_PATH"]
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    tasks = suite_tasks(options.suite) if options.task_id is None else [find_task(options.suite, options.task_id)]
    states = {task.name: held_out_states(task) for task in tasks}
    path: Path = options.output or HELD_OUT_DIR / f"{options.suite}.npz"
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    np.savez_compressed(temporary, **states)  # pyright: ignore[reportArgumentType]
    temporary.replace(path)


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
    for candidate in _candidates(task, simulation):
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


def _candidates(task: Task, simulation: Simulation) -> Iterator[np.ndarray]:
    unpruned = unpruned_init_states(task)
    if unpruned is not None:
        yield from unpruned
    first = _SEEDS_PER_TASK * (task.task_id + 1)
    seeds = range(first, first + _MAX_SAMPLED)
    # A soft reset is 20 times as fast, but puts an object that starts on a fixture in the air.
    soft, hard = next(_sampled(task, seeds, hard_reset=False)), next(_sampled(task, seeds, hard_reset=True))
    heights = _free_addresses(simulation.model) + 1 + 2
    yield from _sampled(task, seeds, hard_reset=not np.allclose(soft[heights], hard[heights], atol=0.01))


def _sampled(task: Task, seeds: range, hard_reset: bool) -> Iterator[np.ndarray]:
    """States drawn by the reference environment, one per seed."""
    from pi0rl.libero.build import reference_environment

    # The official states also vary the arm's joints, by normal noise of 0.02 rad (robosuite's default).
    environment = reference_environment(task.bddl_file, hard_reset=hard_reset, initialization_noise="default")
    for seed in seeds:
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
