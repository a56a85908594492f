"""MLflow's pages in a browser: the list of runs is the table of results."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from browser import chromium, open_page
from projects import make_project

from pi0rl.experiment import open_experiment
from pi0rl.processes import start_child, stop_session
from pi0rl.tracking.mlflow_logger import MlflowLogger, tracking_uri
from pi0rl.tracking.view import VIEW

RUNS = {"ppo-seed0": 0.71, "ppo-seed1": 0.67, "grpo-seed0": 0.73}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The pages of a database with three finished experiments."""
    chromium()  # no need to start anything where there is none
    monkeypatch.chdir(make_project(tmp_path / "p"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, success in RUNS.items():
        experiment = open_experiment("quickstart", (), f"runs/sweeps/s/{name}")
        logger = MlflowLogger(experiment)
        logger.add_results(_results(name.partition("-")[0], success), {})
        logger.finish()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ("--backend-store-uri", tracking_uri(experiment.root), "--port", str(port), "--workers", "1")
    process = start_child(
        [str(Path(sys.executable).parent / "mlflow"), "server", *options],
        experiment.root,
        {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    )
    address = f"http://127.0.0.1:{port}"
    _await_answer(f"{address}/health", process)
    yield address
    process.terminate()
    stop_session(process.pid)
    process.wait()


@pytest.mark.slow
def test_the_list_of_runs_is_the_comparison(server: str, tmp_path: Path) -> None:
    page = f"{server}/#/experiments/1/runs?viewStateShareKey={VIEW}"
    dom = open_page(page, tmp_path / "profile", "--window-size=2400,1000", "--virtual-time-budget=60000").stdout
    text = re.sub(r"<[^>]+>", "\n", dom)
    for column in ("before", "after", "change", "mcnemar_p", "algorithm", "suites", "seed"):
        assert re.search(rf"^(pi0rl\.)?{column}$", text, flags=re.MULTILINE), column
    for words in ("0.71", "0.67", "0.73", "libero_object"):
        assert words in text
    shown = list(dict.fromkeys(re.findall(r"sweeps/s/([a-z]+-seed\d)", text)))
    assert shown == ["grpo-seed0", "ppo-seed0", "ppo-seed1"]  # the best first; the suites' nested runs are left out


def _results(algorithm: str, success: float) -> dict[str, object]:
    rows = [
        {"policy": name, "split": "held_out", "suite": "libero_object", "k": k, "n": 100, "wilson": [0.3, 0.6]}
        for name, k in (("sft", 43), (algorithm, round(100 * success)))
    ]
    change = {"before": "sft", "after": algorithm, "split": "held_out", "change": success - 0.43, "mcnemar_p": 0.01}
    return {"rows": rows, "comparisons": [{"suite": suite, **change} for suite in ("libero_object", "all")]}


def _await_answer(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 600
    while True:
        try:
            with urlopen(url, timeout=5):
                return
        except (URLError, OSError):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.5)
