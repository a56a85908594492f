"""Simplified render models on disk, beside the task's other compiled files.

`python -m pi0rl.libero.render_cache SUITE TASK_ID SEED CELLS FILE` builds one: a program of its own, since compiling
the full model leaves more than 1 GB with the process that does it.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import mujoco

from pi0rl.errors import UserError
from pi0rl.libero.compile import full_model, prepare_task
from pi0rl.libero.simplify import simplified_model
from pi0rl.libero.suites import Task, task

# Raise when `simplify` makes another model of the same input.
_FORMAT = 1


def cached_simplified_model(task: Task, seed: int, cells: int) -> mujoco.MjModel:
    """The task's render model with meshes clustered to `cells`; built on the first call on this machine (3 s).

    Raises:
        UserError: The build failed.
    """
    directory = prepare_task(task, [seed])
    path = directory / f"render_{cells}_v{_FORMAT}.mjb"
    if not path.exists():
        # One builder at a time; the others wait and find the file.
        with (directory / ".render_lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _build(task, seed, cells, path)
    return mujoco.MjModel.from_binary_path(str(path))


def _build(task: Task, seed: int, cells: int, path: Path) -> None:
    arguments = [task.suite, str(task.task_id), str(seed), str(cells), str(path)]
    command = [sys.executable, "-m", "pi0rl.libero.render_cache", *arguments]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip() or f"ended with {result.returncode}").splitlines()[-1]
        raise UserError(f"simplifying the model of {task.suite} task {task.task_id} failed: {reason}")


def main(suite: str, task_id: str, seed: str, cells: str, file: str) -> None:
    model = simplified_model(full_model(task(suite, int(task_id)), int(seed)), int(cells))
    path = Path(file)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    mujoco.mj_saveModel(model, str(temporary), None)
    temporary.replace(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
