"""An object in a process of its own: calls go out, results come back, and the process never outlives its parent.

The process is a new interpreter (spawned, never forked: GL contexts and thread pools do not survive a fork) that
imports only what the object needs, not the caller's main module.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pi0rl.errors import UserError

# The first use of a task builds its models; a chunk takes well under a second.
REPLY_SECONDS = 900.0
_POLL_SECONDS = 1.0
_CLOSE_SECONDS = 5.0
_PACKAGE_ROOT = Path(__file__).parents[2]


class WorkerDied(UserError):
    """A worker process ended without being asked to."""


class Worker:
    """A new process that holds `make(*arguments)`.

    One reply to `receive` comes for its construction (None) and one for each `send`, in order.

    Args:
        make: A class or function of an importable module.
        arguments: Its arguments; they are pickled.
        variables: Environment variables for the process, laid over this one's.
        descriptors: Open files to hand on under the same numbers.
    """

    def __init__(
        self,
        make: Callable[..., Any],
        arguments: tuple[Any, ...],
        variables: Mapping[str, str] | None = None,
        descriptors: Sequence[int] = (),
    ):
        self.connection, theirs = Pipe()
        path = os.pathsep.join(filter(None, [str(_PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pi0rl.libero.worker", str(theirs.fileno()), str(os.getpid())],
                env={**os.environ, "PYTHONPATH": path, **(variables or {})},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), *descriptors],
                # Ctrl-C in a terminal reaches only us, and we end the worker.
                start_new_session=True,
            )
        self._send((make, arguments))

    def send(self, method: str, *arguments: Any) -> None:
        """Ask for a call of the object's method; the result comes with `receive`."""
        self._send((method, arguments))

    def receive(self, seconds: float = REPLY_SECONDS) -> Any:
        """The next reply.

        Raises:
            UserError: The call raised one, or nothing came in time.
            WorkerDied: The process ended.
            RuntimeError: The call failed otherwise; the message is its traceback.
        """
        try:
            if not self.connection.poll(seconds):
                raise UserError(f"waited {seconds:.0f} s for a simulation worker; is it stuck? Run it again")
            reply = self.connection.recv()
        except (EOFError, OSError) as error:
            code = self.process.wait()
            raise WorkerDied(f"a simulation worker died (exit code {code}; -9 often means out of memory)") from error
        if isinstance(reply, Exception):
            raise reply
        return reply

    def close(self) -> None:
        """End the process; a call in progress is given a few seconds."""
        self.connection.close()
        try:
            self.process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _send(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # it is dead; `receive` tells
            self.connection.send(message)


def main(descriptor: str, parent: str) -> None:
    """A worker's life: make the object, answer calls until the parent closes the pipe or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Connection(int(descriptor)) as connection, contextlib.suppress(EOFError, OSError):
        make, arguments = _receive(connection, int(parent))
        try:
            target = make(*arguments)
        except Exception as error:
            connection.send(_sendable(error))
            return
        connection.send(None)
        while True:
            method, arguments = _receive(connection, int(parent))
            try:
                result = getattr(target, method)(*arguments)
            except Exception as error:
                result = _sendable(error)
            connection.send(result)


def _sendable(error: Exception) -> Exception:
    return error if isinstance(error, UserError) else RuntimeError(f"in a simulation worker:\n{traceback.format_exc()}")


def _receive(connection: Connection, parent: int) -> Any:
    # A fork of the parent may hold the other end open after the parent's death, so its end is not waited for alone.
    while not connection.poll(_POLL_SECONDS):
        if os.getppid() != parent:
            raise EOFError
    return connection.recv()


if __name__ == "__main__":
    main(*sys.argv[1:])
