"""The two sides of the comparison, each in a process of its own and idle while the other one works.

Seconds are CPU seconds of the process and all its threads, so that a busy machine does not count; software GL and BLAS
are kept to one thread on both sides.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil

from benchmarks.reference_rollout import Photographer, off_screen_environment
from pi0rl.libero.compile import compiled_task, reference_variables
from pi0rl.libero.rendering import PROFILES, Renderer, process_context
from pi0rl.libero.simulation import Simulation
from pi0rl.libero.suites import Task, official_init_states

SEED = 0
ONE_THREAD = {"LP_NUM_THREADS": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Side:
    """A process that holds one object; `call` runs a method of it and waits for the result."""

    def __init__(self, kind: type, *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, kind, arguments), daemon=True)
        self._process.start()

    def call(self, method: str, *arguments: Any) -> Any:
        self._connection.send((method, arguments))
        result, failure = self._connection.recv()
        if failure:
            raise RuntimeError(failure)
        return result

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(connection: Any, kind: type, arguments: tuple[Any, ...]) -> None:
    held = kind(*arguments)
    while True:
        method, values = connection.recv()
        try:
            connection.send((getattr(held, method)(*values), None))
        except Exception:
            connection.send((None, traceback.format_exc()))


class Reference:
    """LIBERO's `OffScreenRenderEnv`."""

    def __init__(self, task: Task, camera_size: int):
        variables = reference_variables()
        os.environ.clear()
        os.environ.update(variables)
        self._state = official_init_states(task)[0]
        self._environment = off_screen_environment(str(task.bddl_file), camera_size)

    def reset(self) -> float:
        """Seconds of an episode's start."""

        def start() -> None:
            self._environment.seed(SEED)
            self._environment.reset()
            self._environment.set_init_state(self._state)

        return _seconds(start)

    def steps(self, actions: np.ndarray) -> float:
        """Seconds of control steps, with pictures of both cameras in each until `blindfold`."""

        def play() -> None:
            for action in actions:
                self._environment.step(action)

        return _seconds(play)

    def blindfold(self) -> None:
        """No pictures from now on."""
        Photographer(self._environment, sizes=[])


class Ours:
    """`Simulation` and `Renderer`."""

    def __init__(self, task: Task):
        self._task = task
        self._state = official_init_states(task)[0]
        # Compiled code, the task's files, NumPy's and SciPy's libraries: whatever only the first simulation pays for.
        self._simulation = Simulation(task, SEED)
        self._simulation.step_chunk(np.zeros((1, 7)))
        self._renderers: dict[tuple[str, int], Renderer] = {}

    def back_end(self) -> str:
        """The GL back end and what it draws with."""
        context = process_context()
        return f"{context.backend}, {context.device}"

    def reset(self, count: int) -> float:
        """Seconds of an episode's start, mean of `count`."""

        def start() -> None:
            for _ in range(count):
                self._simulation.reset(self._state, settle_steps=0)

        return _seconds(start) / count

    def load(self) -> tuple[float, float]:
        """Seconds to make a simulation from the compiled model on disk, and from the one in memory."""
        compiled_task.cache_clear()
        from_disk = _seconds(lambda: Simulation(self._task, SEED))
        return from_disk, _seconds(lambda: Simulation(self._task, SEED))

    def memory_per_slot(self, count: int) -> float:
        """Bytes that each of `count` further simulations holds after some steps."""
        process = psutil.Process()
        before = process.memory_info().rss
        slots = [Simulation(self._task, SEED) for _ in range(count)]
        for slot in slots:
            slot.reset(self._state)
        return (process.memory_info().rss - before) / len(slots)

    def steps(self, actions: np.ndarray) -> float:
        """Seconds of control steps without pictures."""
        return _seconds(lambda: self._simulation.step_chunk(actions))

    def chunks(self, chunks: np.ndarray, profile: str, size: int) -> float:
        """Seconds of chunks [n, C, 7] with a look of both cameras after each; a profile's first look does not count."""
        if (profile, size) not in self._renderers:
            self._renderers[profile, size] = Renderer(size, PROFILES[profile])
            self._look(profile, size)

        def play() -> None:
            for actions in chunks:
                self._simulation.step_chunk(actions)
                self._look(profile, size)

        return _seconds(play)

    def _look(self, profile: str, size: int) -> None:
        state = self._simulation.render_state()
        for camera in ("agentview", "robot0_eye_in_hand"):
            self._renderers[profile, size].render(self._task, SEED, state, camera)


def _seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started
