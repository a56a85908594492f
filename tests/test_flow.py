"""The Prefect flow over DVC's stages: order, skipping, one-line errors, interruption without orphans."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from projects import call, environment, make_project, start

from flows.experiment import run_stage
from pi0rl.errors import UserError

# Fails as a stage does, unless there is a file to say otherwise; sleeps where there is a file named slow
STAGE = """
if [ -e fail ]; then echo 'pi0rl: error: no GL driver; install one' >&2; exit 2; fi
if [ -e crash ]; then echo 'Traceback of a bug' >&2; exit 1; fi
if [ -e kill ]; then kill -9 $$; fi
echo 'sft: step 1/2, 0:01 left'
if [ -e slow ]; then sleep 300 & echo $! > sleeper; wait; fi
mkdir -p $1 && echo done > $1/file
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = make_project(tmp_path / "p", STAGE)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    return folder


def test_a_stage_runs_once_and_shows_its_lines(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in ("resolve", "demos"):
        assert run_stage.fn(stage, f"dvc.yaml:{stage}", project).startswith("done in")
    assert capsys.readouterr().out == "    demos 1/1\n"
    assert run_stage.fn("demos", "dvc.yaml:demos", project) == "unchanged"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("fail", "sft: no GL driver; install one"),
        ("crash", "sft: it failed; what it said is above"),
        ("kill", "sft: killed, by hand or because memory ran out"),
    ],
)
def test_a_stages_own_words_are_the_error(
    project: Path, capsys: pytest.CaptureFixture[str], trouble: str, message: str
) -> None:
    (project / trouble).touch()
    for stage in ("resolve", "demos"):
        run_stage.fn(stage, f"dvc.yaml:{stage}", project)
    capsys.readouterr()
    with pytest.raises(UserError) as caught:
        run_stage.fn("sft", "dvc.yaml:sft", project)
    assert str(caught.value) == message
    assert ("Traceback of a bug" in capsys.readouterr().out) == (trouble == "crash")


def test_interrupted_it_leaves_nothing_and_goes_on(project: Path) -> None:
    (project / "slow").touch()
    process = start("run", "quickstart", cwd=project)
    sleeper = _wait_for_sleeper(process, project / "sleeper")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors == "interrupted; run the same command again to go on\n"
    assert _ended(sleeper)
    assert not (project / "runs" / "quickstart" / "sft").exists()

    (project / "slow").unlink()
    result = call("run", "quickstart", cwd=project)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "[2/3] demos: unchanged" in result.stdout
    assert "    sft: step 1/2, 0:01 left" in result.stdout
    assert "[3/3] sft: done in" in result.stdout
    dvc = [str(Path(sys.executable).parent / "dvc"), "status"]
    status = subprocess.run(dvc, cwd=project, env=environment(), capture_output=True, text=True, check=True)
    assert "up to date" in status.stdout


def _ended(pid: int) -> bool:
    """Whether nothing runs under ``pid``; what init has not yet collected does not run."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.slow
def test_a_killed_runner_takes_its_stage_along(project: Path) -> None:
    (project / "slow").touch()
    process = start("run", "quickstart", cwd=project)
    sleeper = psutil.Process(_wait_for_sleeper(process, project / "sleeper"))
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    _, alive = psutil.wait_procs([sleeper, *family], timeout=60)
    assert alive == []


def _wait_for_sleeper(process: subprocess.Popen[str], path: Path) -> int:
    """The process id that a stage wrote; Prefect's server takes 10 s to start, on a busy machine minutes."""
    deadline = time.monotonic() + 400
    while not (path.is_file() and path.read_text().strip()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the stage did not start"
        time.sleep(0.1)
    return int(path.read_text())
