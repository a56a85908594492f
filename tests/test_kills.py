"""SIGKILL to any process of a training at any moment, Ray's own among them: resumed, it ends in the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tiny_policies import PREFIX_CRITIC, make_policy

from pi0rl.policy.checkpoints import save_policy

SCRIPT = Path(__file__).with_name("tiny_training.py")
KINDS = ("driver", "ray::EnvWorker", "ray::PolicyWorker", "raylet", "gcs_server")
KILLS = 20
# Ray's own processes notice within this time that their driver is gone.
ORPHAN_SECONDS = 90.0
RUN_SECONDS = 900.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("kills") / "policy"
    save_policy(make_policy(PREFIX_CRITIC), directory)
    return directory


@pytest.mark.slow
def test_killed_anywhere_and_resumed_it_ends_in_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    seconds, lines = _run(checkpoint, tmp_path / "straight", None, 0.0)
    straight = _result(lines)
    rng = random.Random(0)
    kills = [(KINDS[number % len(KINDS)], rng.uniform(0.0, 1.1 * seconds)) for number in range(KILLS)]
    for number, (kind, moment) in enumerate(kills):
        folder = tmp_path / str(number)
        _, lines = _run(checkpoint, folder, kind, moment)
        if not any(line.startswith("done") for line in lines):
            assert kind == "driver" or any(line.startswith("error: ") for line in lines), (kind, lines[-5:])
            _, lines = _run(checkpoint, folder, None, 0.0)
        assert _result(lines) == straight, (kind, moment)


def _run(checkpoint: Path, folder: Path, kind: str | None, moment: float) -> tuple[float, list[str]]:
    """Train; ``moment`` seconds after Ray is up, kill a process of ``kind``. Returns seconds from then and output."""
    command = [sys.executable, str(SCRIPT), str(checkpoint), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    driver = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    assert driver.stdout is not None
    lines = []
    try:
        for line in driver.stdout:
            lines.append(line.strip())
            if lines[-1] == "playing":
                break
        started, family = time.monotonic(), psutil.Process(driver.pid).children(recursive=True)
        if kind is not None:
            time.sleep(moment)
            if driver.poll() is None:
                family = _kill(driver, kind) | set(family)
        lines += driver.communicate(timeout=RUN_SECONDS)[0].splitlines()
    finally:
        driver.kill()
    seconds = time.monotonic() - started
    _, alive = psutil.wait_procs(list(family), timeout=ORPHAN_SECONDS)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    return seconds, lines


def _kill(driver: subprocess.Popen[str], kind: str) -> set[psutil.Process]:
    """SIGKILL to one process of ``kind`` if there is one; returns all that there are."""
    family = psutil.Process(driver.pid).children(recursive=True)
    names = {process: process.name() for process in family if process.is_running()}
    victims = [process.pid for process, name in names.items() if name.startswith(kind)]
    if kind == "driver":
        victims = [driver.pid]
    for pid in victims[:1]:
        os.kill(pid, signal.SIGKILL)
    return set(family)


def _result(lines: list[str]) -> bytes:
    done = next(line for line in lines if line.startswith("done "))
    return (Path(done.removeprefix("done ")) / "model.safetensors").read_bytes()
