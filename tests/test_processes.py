"""Child processes: output as it comes, exit codes, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from projects import ROOT

from pi0rl.processes import (
    GRACE_VARIABLE,
    Interrupted,
    raise_on_signals,
    run_child,
    signals_postponed,
    stop_descendants,
)

# A supervisor as `pi0rl run` is one: it watches a shell that watches a sleeper
SUPERVISOR = """
import os, sys
from pathlib import Path
from pi0rl.processes import Interrupted, raise_on_signals, run_child
raise_on_signals()
try:
    run_child(["sh", "-c", "sleep 300 & echo $! > sleeper; wait"], Path.cwd(), {}, print, os.killpg)
except Interrupted as interruption:
    sys.exit(128 + interruption.signum)
"""


def test_lines_and_exit_code(tmp_path: Path) -> None:
    lines: list[str] = []
    command = ["sh", "-c", "echo $WORD; echo wrong >&2; exit 3"]
    assert run_child(command, tmp_path, {"WORD": "hello"}, lines.append, os.killpg) == 3
    assert lines == ["hello", "wrong"]


def test_death_by_signal_is_128_and_more(tmp_path: Path) -> None:
    assert run_child(["sh", "-c", "kill -9 $$"], tmp_path, {}, None, os.killpg) == 128 + signal.SIGKILL


def test_strays_end_with_the_child(tmp_path: Path) -> None:
    command = ["sh", "-c", "sleep 300 > /dev/null 2>&1 & echo $! > stray"]
    assert run_child(command, tmp_path, {}, print, os.killpg) == 0
    assert _ended(int((tmp_path / "stray").read_text()))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_supervisor_stops_its_child(tmp_path: Path, signum: signal.Signals) -> None:
    supervisor, sleeper = _supervised(tmp_path)
    supervisor.send_signal(signum)
    assert supervisor.wait(timeout=60) == 128 + signum
    assert _ended(sleeper)


@pytest.mark.parametrize(("seconds", "ended"), [(60.0, [True]), (0.05, [])], ids=["in time", "too late"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_a_block_but_not_for_ever(
    signum: signal.Signals, seconds: float, ended: list[bool]
) -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    reached: list[bool] = []

    def signalled_twice() -> None:
        with signals_postponed(seconds):
            for _ in range(2):
                signal.raise_signal(signum)
            time.sleep(0.3)
            reached.append(True)

    raise_on_signals()
    try:
        with pytest.raises(Interrupted) as raised:
            signalled_twice()
        assert signal.getsignal(signum) == signal.SIG_IGN  # a later one cannot break into the cleaning up
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert raised.value.signum == signum
    assert reached == ended


@pytest.mark.parametrize("seconds", ["10m", "0", "inf", "nan"])
def test_a_grace_time_that_is_none_is_refused_in_one_line(seconds: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), GRACE_VARIABLE: seconds}
    command = [sys.executable, "-c", "import pi0rl.processes"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"pi0rl: error: {GRACE_VARIABLE}={seconds}: expected a positive number of seconds\n"


def test_a_child_that_another_thread_stops_keeps_its_exit_code(tmp_path: Path) -> None:
    stopper = threading.Timer(1.0, stop_descendants)
    stopper.start()
    assert run_child(["sleep", "300"], tmp_path, {}, print, os.killpg) == 128 + signal.SIGTERM
    stopper.join()


def _ended(pid: int) -> bool:
    """Whether the process is gone, or only waits for init to notice its end."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _supervised(folder: Path) -> tuple[subprocess.Popen[bytes], int]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISOR], cwd=folder, env=environment)
    sleeper = folder / "sleeper"
    deadline = time.monotonic() + 60
    while not (sleeper.is_file() and sleeper.read_text().strip()):
        assert supervisor.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return supervisor, int(sleeper.read_text())
