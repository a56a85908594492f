"""Ray's own processes, watched: when one dies, calls into Ray would wait for minutes and then end us unheard."""

from __future__ import annotations

import _thread
import os
import sys
import threading
from types import TracebackType

import psutil

from pi0rl.errors import UserError
from pi0rl.processes import stop_descendants

VITAL = ("gcs_server", "raylet")
LOOK_SECONDS = 0.5
# The main thread may be in a call of Ray's that no interrupt ends; then the process ends without it.
REACT_SECONDS = 5.0


class Vitals:
    """Watches those of ``VITAL`` that this process has started; around what uses Ray.

    A death interrupts the main thread, whatever it is doing, and becomes a UserError; where Ray does not let the main
    thread go, the process says so and ends with exit code 2, after all that it has started. Where this process has
    started none (it joined a cluster), nothing is watched: Ray itself reports a lost node.
    """

    def __init__(self) -> None:
        self._processes = [child for child in psutil.Process().children() if child.name() in VITAL]
        self._names = {process.pid: process.name() for process in self._processes}
        self._dead = ""
        self._seen, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="vitals", daemon=True)

    def __enter__(self) -> Vitals:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            self._seen.wait(2 * LOOK_SECONDS)  # what failed may be the first sign of a death
        self._ended.set()
        self._thread.join()
        if self._dead and error is not None:
            raise UserError(self._message()) from error

    def _watch(self) -> None:
        while not self._dead and not self._ended.wait(LOOK_SECONDS):
            dead = [process for process in self._processes if not _alive(process)]
            if dead:
                self._dead = self._names[dead[0].pid]
                self._seen.set()
                _thread.interrupt_main()
                if not self._ended.wait(REACT_SECONDS):
                    print(f"pi0rl: error: {self._message()}", file=sys.stderr, flush=True)
                    stop_descendants()
                    os._exit(2)

    def _message(self) -> str:
        return f"Ray's {self._dead} died; run the same command to resume"


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
