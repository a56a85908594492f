"""A training as processes that are stopped or killed, Ray's own among them: resumed, it ends in the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from tiny_policies import PREFIX_CRITIC, make_policy

from pi0rl.policy.checkpoints import save_policy
from pi0rl.processes import GRACE_VARIABLE

SCRIPT = Path(__file__).with_name("tiny_training.py")
# Nothing but what a test does may cause a checkpoint, or a failure.
PARAMS = ("runner.max_epochs=3", "algorithm.collapse_kl=null", "algorithm.collapse_drop=null")
KINDS = ("driver", "ray::EnvWorker", "ray::PolicyWorker", "raylet", "gcs_server")
KILLS = 20
# Ray's own processes notice within this time that their driver is gone.
ORPHAN_SECONDS = 90.0
RUN_SECONDS = 900.0
# More than the usual time to stop: tests may run on a busy machine.
GRACE_SECONDS = 120.0


@dataclass(frozen=True)
class Run:
    """Seconds from the moment Ray was up, all lines of output, and what the folder of the run holds."""

    seconds: float
    lines: list[str]
    folder: Path

    @property
    def finished(self) -> bool:
        return any(line.startswith("done ") for line in self.lines)

    @property
    def result(self) -> tuple[bytes, str]:
        """The final policy's weights and the metrics."""
        assert self.finished, self.lines[-5:]
        policy = Path(next(line for line in self.lines if line.startswith("done ")).removeprefix("done "))
        return (policy / "model.safetensors").read_bytes(), (self.folder / "metrics.csv").read_text()


Trouble = Callable[[subprocess.Popen[str]], set[psutil.Process]]
"""Driver -> the processes that were below it when it got into trouble."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("kills") / "policy"
    save_policy(make_policy(PREFIX_CRITIC), directory)
    return directory


@pytest.fixture(scope="module")
def straight(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What nobody has disturbed."""
    return train(checkpoint, tmp_path_factory.mktemp("straight"))


def test_stopped_it_saves_what_is_done_and_goes_on_from_there(checkpoint: Path, tmp_path: Path, straight: Run) -> None:
    rare = "runner.save_interval=3"
    signalled = []

    def stop(driver: subprocess.Popen[str]) -> set[psutil.Process]:
        family = relatives(driver)
        driver.send_signal(signal.SIGTERM)
        signalled.append(time.monotonic())
        return family

    stopped = train(checkpoint, tmp_path, rare, trouble=stop, after="iteration 0")
    assert not stopped.finished
    assert time.monotonic() - signalled[0] < GRACE_SECONDS
    done = len((tmp_path / "metrics.csv").read_text().splitlines()) - 1
    assert done in (1, 2)  # the second one if the signal came late
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"stopped_{done:05d}"]
    assert f"train: stopped after {done} iterations, all of them are saved" in stopped.lines
    resumed = train(checkpoint, tmp_path, rare)
    assert resumed.lines.count("iteration 0") == 0
    assert resumed.result == straight.result
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["iteration_00003"]


def test_killed_and_resumed_it_ends_in_the_same_bytes(checkpoint: Path, tmp_path: Path, straight: Run) -> None:
    killed = train(checkpoint, tmp_path, trouble=lambda driver: kill(driver, "driver", []), after="iteration 1")
    assert not killed.finished
    assert train(checkpoint, tmp_path).result == straight.result


@pytest.mark.slow
def test_killed_anywhere_at_any_moment_it_ends_in_the_same_bytes(
    checkpoint: Path, tmp_path: Path, straight: Run
) -> None:
    rng, killed = random.Random(0), list[str]()
    for number in range(2 * KILLS):  # some come when the run has just ended
        kind, moment = KINDS[number % len(KINDS)], rng.uniform(0.0, straight.seconds)

        def trouble(driver: subprocess.Popen[str], kind: str = kind, moment: float = moment) -> set[psutil.Process]:
            time.sleep(moment)
            return kill(driver, kind, killed)

        folder = tmp_path / str(number)
        run = train(checkpoint, folder, trouble=trouble)
        if not run.finished:
            told = any(line.startswith(("error: ", "pi0rl: error: ")) for line in run.lines)
            assert kind == "driver" or told, (kind, run.lines[-5:])
            run = train(checkpoint, folder)
        assert run.result == straight.result, (kind, moment)
        if len(killed) == KILLS:
            break
    assert len(killed) == KILLS
    assert set(killed) == set(KINDS)


def train(
    checkpoint: Path, folder: Path, *overrides: str, trouble: Trouble | None = None, after: str = "playing"
) -> Run:
    """Train in ``folder``, and cause ``trouble`` once the line ``after`` is out; no process is left behind."""
    command = [sys.executable, str(SCRIPT), str(checkpoint), str(folder), *PARAMS, *overrides]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), GRACE_VARIABLE: str(GRACE_SECONDS)}
    driver = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    assert driver.stdout is not None
    lines, started = [], time.monotonic()
    try:
        for line in driver.stdout:
            lines.append(line.strip())
            started = time.monotonic() if lines[-1] == "playing" else started
            if lines[-1] == after:
                break
        family = relatives(driver)
        if trouble is not None and driver.poll() is None:
            family |= trouble(driver)
        lines += driver.communicate(timeout=RUN_SECONDS)[0].splitlines()
    finally:
        driver.kill()
    seconds = time.monotonic() - started
    _, alive = psutil.wait_procs(list(family), timeout=ORPHAN_SECONDS)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    return Run(seconds, lines, folder)


def relatives(driver: subprocess.Popen[str]) -> set[psutil.Process]:
    """The processes below ``driver``; none where it is gone."""
    try:
        return set(psutil.Process(driver.pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def kill(driver: subprocess.Popen[str], kind: str, killed: list[str]) -> set[psutil.Process]:
    """SIGKILL to one process of ``kind`` if there is one, which adds to ``killed``; returns all that there were."""
    family = relatives(driver)
    names = {process.pid: process.name() for process in family if process.is_running()}
    victims = [driver.pid] if kind == "driver" else [pid for pid, name in names.items() if name.startswith(kind)]
    for pid in victims[:1]:
        os.kill(pid, signal.SIGKILL)
        killed.append(kind)
    return family
