"""Processes that never outlive the one that started them, and signals as an exception.

Three rules hold everywhere: a child lives in its own session, so that a terminal's Ctrl-C reaches only the outermost
process; a child receives SIGTERM when its parent dies, however it dies; and before a process leaves, it stops whatever
it started.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

# Time a child has to save what it can and to shut Ray or the simulators down (about 2 s) before it is killed. Whoever
# has more of it, as on a cluster whose scheduler warns early, says so in the variable: it is no part of an experiment.
GRACE_VARIABLE = "PI0RL_GRACE_SECONDS"


def _grace_seconds() -> float:
    text = os.environ.get(GRACE_VARIABLE, "20")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.0 < seconds < math.inf:
        # no UserError: this is read on import, where nobody would make a line of it
        print(f"pi0rl: error: {GRACE_VARIABLE}={text}: expected a positive number of seconds", file=sys.stderr)
        raise SystemExit(2)
    return seconds


GRACE_SECONDS = _grace_seconds()

_LIBC = ctypes.CDLL(None)  # loaded here: nothing may be loaded between fork and exec
_PR_SET_PDEATHSIG = 1


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived; not an Exception, so that no ``except Exception`` swallows it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def raise_on_signals() -> None:
    """Turn the first SIGINT or SIGTERM into Interrupted; later ones are ignored, so that cleaning up can finish."""

    def interrupt(signum: int, frame: object) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(signum)

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, interrupt)


@contextmanager
def signals_postponed(seconds: float) -> Iterator[None]:
    """A SIGINT or SIGTERM that arrives in the block is delivered at its end, or after ``seconds`` if that is sooner."""
    arrived: list[int] = []

    def postpone(signum: int, frame: object) -> None:
        if not arrived:
            arrived.append(signum)
            signal.setitimer(signal.ITIMER_REAL, seconds)

    def deliver(*_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        handlers = dict(before)
        before.clear()  # once: what a handler has put in its own place stays there
        for each, handler in handlers.items():
            signal.signal(each, handler)
        if arrived:
            signal.raise_signal(arrived.pop())

    before = {each: signal.signal(each, postpone) for each in (signal.SIGINT, signal.SIGTERM)}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, deliver)
    try:
        yield
    finally:
        deliver()


def die_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent dies (Linux); nothing on systems without prctl."""
    if hasattr(_LIBC, "prctl"):
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def run_child(
    command: Sequence[str],
    cwd: Path,
    environment: Mapping[str, str],
    on_line: Callable[[str], None] | None,
    send: Callable[[int, int], None],
) -> int:
    """Run ``command`` to its end and return its exit code (128 + n after signal n); leave no descendant behind.

    Args:
        command: program and arguments.
        cwd: working directory of the child.
        environment: variables laid over this process's own.
        on_line: called with each line of the child's output as it appears; None lets the child write to our own output.
        send: how an interruption is handed on: ``os.kill`` to the child alone, ``os.killpg`` to its whole group.
    """
    process = start_child(command, cwd, environment, piped=on_line is not None)
    try:
        if on_line is not None and process.stdout is not None:
            for line in process.stdout:
                on_line(line.decode(errors="replace").rstrip("\n"))
        code = process.wait()
    except BaseException:
        _interrupt(process, send)
        raise
    finally:
        stop_session(process.pid)
    return code if code >= 0 else 128 - code


def start_child(
    command: Sequence[str], cwd: Path, environment: Mapping[str, str], piped: bool = False
) -> subprocess.Popen[bytes]:
    """Start ``command`` in a session of its own, to end with us; ``piped``: its lines go to its stdout."""
    return subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if piped else None,
        stderr=subprocess.STDOUT if piped else None,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


def stop_session(session: int) -> None:
    """Kill every process of ``session``: what a child left behind in its own session."""
    strays = [p for p in psutil.process_iter() if _session_of(p) == session]
    _stop(strays, grace=0.0)


def stop_descendants() -> None:
    """Stop all processes below this one: SIGTERM, then SIGKILL after a few seconds."""
    _stop(psutil.Process().children(recursive=True), grace=5.0)


def _interrupt(process: subprocess.Popen[bytes], send: Callable[[int, int], None]) -> None:
    """Hand an interruption on, wait for the child to clean up, kill it and its descendants if it does not."""
    descendants = _descendants(process.pid)
    deadline = time.monotonic() + GRACE_SECONDS
    try:
        send(process.pid, signal.SIGINT)
        while process.poll() is None and time.monotonic() < deadline:
            # an unread pipe would block a child that still writes while it cleans up
            if process.stdout is not None:
                os.set_blocking(process.stdout.fileno(), False)
                process.stdout.read()
            time.sleep(0.05)
    except ProcessLookupError:
        pass  # it ended by itself in the meantime
    _stop([*descendants, *_descendants(process.pid)], grace=0.0)
    process.kill()
    process.wait()


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _stop(processes: Sequence[psutil.Process], grace: float) -> None:
    for process in processes:
        _signal(process, signal.SIGTERM)
    alive = _await_end(processes, timeout=grace)
    for process in alive:
        _signal(process, signal.SIGKILL)
    _await_end(alive, timeout=5.0)


def _await_end(processes: Sequence[psutil.Process], timeout: float) -> list[psutil.Process]:
    """Those of ``processes`` that still run after ``timeout`` seconds.

    Only looks, and leaves zombies to whoever started them: psutil's own waiting would take the exit code of another
    thread's child away, and subprocess then reports 0 for a child that was killed.
    """
    deadline = time.monotonic() + timeout
    while alive := [process for process in processes if _runs(process)]:
        if time.monotonic() >= deadline:
            break
        time.sleep(0.02)
    return alive


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _signal(process: psutil.Process, signum: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):  # it ended by itself in the meantime
        process.send_signal(signum)


def _session_of(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except (ProcessLookupError, PermissionError):
        return None
