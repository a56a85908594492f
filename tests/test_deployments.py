"""Deployments on a real server and worker: the bare name, parameters, artifacts, cancelling; no server, no schedule."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import psutil
import pytest
from projects import ROOT, environment, make_sweep

from pi0rl.processes import die_with_parent

PREFECT = str(Path(sys.executable).parent / "prefect")
SECONDS = 900.0  # a busy machine starts Prefect in minutes


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = make_sweep(tmp_path / "p")
    (folder / "prefect.yaml").write_text((ROOT / "prefect.yaml").read_text())
    (folder / "flows").symlink_to(ROOT / "flows")
    return folder


@pytest.fixture
def api() -> str:
    """The address of a server on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/api"


def test_without_a_server_nothing_is_scheduled_and_that_is_said(project: Path, api: str) -> None:
    for name in ("libero-sweep", "libero-sweep/quickstart"):
        done = _prefect(project, api, "deployment", "run", name)
        assert done.returncode == 1
        assert f"no Prefect server answers at {api}, so nothing would run; start one with `make serve`" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_deployments_run_are_cancelled_and_go_on(project: Path, api: str) -> None:
    with _Serve(project, api):
        run = _schedule(project, api, "libero-sweep", "overrides=[]", "concurrency=2")
        assert _end(api, run) == "COMPLETED"
        assert len((project / "log").read_text().split()) == 4
        assert {"sweep-quickstart", "sweeps-quickstart-lr0-0001-seed0-links"} <= _artifacts(api)

        (project / "slow").touch()
        run = _schedule(project, api, "libero-sweep", 'overrides=["demos.seed=7"]', "concurrency=1")
        sleeper = psutil.Process(int(_await(lambda: (project / "sleeper").is_file() and _text(project / "sleeper"))))
        family = [sleeper, *sleeper.parents()[:6]]
        worker_family = [each for each in family if "repro" in " ".join(each.cmdline())]
        assert worker_family
        assert _prefect(project, api, "flow-run", "cancel", run).returncode == 0
        assert _end(api, run) == "CANCELLED"
        _await(lambda: not any(each.is_running() for each in (sleeper, *worker_family)))

        (project / "slow").unlink()
        run = _schedule(project, api, "libero-experiment", "name=quickstart")
        assert _end(api, run) == "COMPLETED"
    left = [each.cmdline() for each in psutil.process_iter() if _belongs(each, project)]
    assert left == []


class _Serve:
    """`make serve`, without the setting up."""

    def __init__(self, project: Path, api: str) -> None:
        self._log = (project / "serve.log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "flows.serve"],
            cwd=project,
            env={**environment(), "PREFECT_API_URL": api, "PWD": "/"},  # started from elsewhere
            stdout=self._log,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        )
        self._path = project / "serve.log"

    def __enter__(self) -> None:
        def ready() -> bool:
            assert self._process.poll() is None, self._path.read_text()
            return "ready: " in self._path.read_text()

        _await(ready)

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait(timeout=SECONDS)
        self._log.close()


def _schedule(project: Path, api: str, name: str, *params: str) -> str:
    """`prefect deployment run NAME`; returns the id of the flow run."""
    arguments = [word for param in params for word in ("--param", param)]
    done = _prefect(project, api, "deployment", "run", name, *arguments)
    assert done.returncode == 0, done.stderr
    return next(line.split(":", 1)[1].strip() for line in done.stdout.splitlines() if "UUID" in line)


def _prefect(project: Path, api: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    variables = {**environment(), "PREFECT_API_URL": api, "PREFECT_HOME": str(project / ".prefect"), "COLUMNS": "300"}
    return subprocess.run(
        [PREFECT, *arguments], cwd=project, env=variables, capture_output=True, text=True, timeout=SECONDS
    )


def _end(api: str, run: str) -> str:
    """How a flow run ended."""
    ended = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
    return str(_await(lambda: (state := _ask(f"{api}/flow_runs/{run}")["state"]["type"]) in ended and state))


def _artifacts(api: str) -> set[str]:
    return {each["key"] for each in _ask(f"{api}/artifacts/filter", b"{}")}


def _ask(url: str, body: bytes | None = None) -> Any:
    with urlopen(Request(url, body, {"Content-Type": "application/json"}), timeout=60) as answer:
        return json.load(answer)


def _await(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + SECONDS
    while not (value := condition()):
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.5)
    return value


def _text(path: Path) -> str:
    return path.read_text().strip()


def _belongs(process: psutil.Process, project: Path) -> bool:
    try:
        return process.cwd() == str(project) and process.pid != os.getpid()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
