"""Processes that play the expert's episodes: none outlives the collection, however that ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType

import numpy as np

from pi0rl.errors import UserError
from pi0rl.libero.rendering import PROFILES, Renderer
from pi0rl.libero.simulation import Simulation
from pi0rl.libero.suites import Task
from pi0rl.progress import Progress
from pi0rl.sft.recording import Collection, part_name, play, save_part

Unit = tuple[Task, list[int]]
Result = tuple[Task, int, bool]


class WorkerPool:
    """A fixed number of processes; ``with`` it, since leaving ends them."""

    def __init__(self, workers: int, collection: Collection, parts: Path):
        if workers < 1:
            raise UserError(f"demos.workers {workers}: expected at least 1")
        context = multiprocessing.get_context("spawn")
        self._processes = {}
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, collection, parts), daemon=True)
            process.start()
            theirs.close()
            self._processes[ours] = process

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection, process in self._processes.items():
            connection.close()
            process.terminate()
        for process in self._processes.values():
            process.join()

    def play(self, units: Sequence[Unit]) -> Iterator[Result]:
        """Play lists of episodes by their numbers, a task at a time per process; yields episodes as they finish.

        Raises:
            UserError: a worker found something the user can mend, or died.
        """
        queue = deque(_split(units, len(self._processes)))
        total = sum(len(numbers) for _, numbers in queue)
        progress, done, failed = Progress("demos", total, "episode"), 0, 0
        left: dict[Connection, int] = {}
        for connection in self._processes:
            if queue:
                left[connection] = self._hand_out(connection, queue)
        while left:
            for connection in wait(list(left)):
                assert isinstance(connection, Connection)
                result = self._receive(connection)
                done, failed = done + 1, failed + (not result[2])
                progress.update(done, f"{failed} failed")
                yield result
                left[connection] -= 1
                if left[connection] == 0:
                    del left[connection]
                    if queue:
                        left[connection] = self._hand_out(connection, queue)

    def _hand_out(self, connection: Connection, queue: deque[Unit]) -> int:
        unit = queue.popleft()
        try:
            connection.send(unit)
        except ConnectionError:  # the worker has ended: what it said, or its exit code, tells why
            self._receive(connection)
        return len(unit[1])

    def _receive(self, connection: Connection) -> Result:
        try:
            message = connection.recv()
        except (EOFError, ConnectionError):
            process = self._processes[connection]
            process.join()
            raise UserError(
                f"demos: a worker process died (exit code {process.exitcode}; -9 often means out of memory); "
                "run the same command again to go on, with fewer demos.workers if memory was short"
            ) from None
        if isinstance(message, UserError | OSError):
            raise message
        return message


def _split(units: Sequence[Unit], workers: int) -> list[Unit]:
    """A task per unit, since loading a scene takes a second; in pieces only where there are more workers than tasks."""
    pieces = -(-workers // len(units))
    return [
        (task, [int(number) for number in piece])
        for task, numbers in units
        for piece in np.array_split(numbers, min(pieces, len(numbers)))
    ]


def _serve(connection: Connection, collection: Collection, parts: Path) -> None:
    """A worker's life: receive units until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    threading.Thread(target=_die_with_parent, daemon=True).start()
    renderer = Renderer(collection.camera_size, PROFILES[collection.render_profile])
    try:
        while True:
            task, numbers = connection.recv()
            simulation = Simulation(task, collection.scene_seed)
            for number in numbers:
                path = parts / part_name(task, number)
                if not path.exists():
                    save_part(play(simulation, renderer, collection, number), path)
                with np.load(path) as part:
                    success = bool(part["success"])
                connection.send((task, number, success))
    except EOFError:
        return
    except (UserError, OSError) as error:
        connection.send(error)


def _die_with_parent() -> None:
    """End this process when the parent is gone, even if it was killed and could not say goodbye."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
