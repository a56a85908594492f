"""What a stage took is the sum over its invocations, however each of them ended."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from projects import environment, make_sweep

from pi0rl import cli, invocations
from pi0rl.invocations import FILE, Invocation, read_invocations, recorded
from pi0rl.machine import Machine, this_machine
from pi0rl.provenance import Commit

MACHINE = Machine(cores=2, cpu="a processor", gpus=("a GPU",), renderer="egl: a renderer")
COMMIT = Commit("0123abcd", dirty=False)


class Clock:
    """Time that passes when it is told to."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(invocations, "time", made)
    monkeypatch.setattr(invocations, "this_machine", lambda: MACHINE)
    monkeypatch.setattr(invocations, "commit", lambda repository: COMMIT)
    return made


def spend(clock: Clock, folder: Path, seconds: float, origin: str = "a", ends: bool = True) -> None:
    """One invocation of a stage."""
    with recorded(folder, origin, folder):
        clock.now += seconds
        if not ends:
            raise KeyboardInterrupt
        folder.mkdir(exist_ok=True)


def test_an_interrupted_stage_counts_all_its_invocations(clock: Clock, tmp_path: Path) -> None:
    folder = tmp_path / "train"
    for seconds in (40.0, 25.0):
        with pytest.raises(KeyboardInterrupt):
            spend(clock, folder, seconds, ends=False)
    assert not folder.exists()
    spend(clock, folder, 10.0)
    taken = read_invocations(folder)
    assert [each.seconds for each in taken] == [40.0, 25.0, 10.0]
    assert {(each.machine, each.commit) for each in taken} == {(MACHINE, COMMIT)}
    assert [path.name for path in tmp_path.iterdir()] == ["train"]
    spend(clock, folder, 0.1)  # found finished
    assert read_invocations(folder) == taken
    shutil.rmtree(folder)
    spend(clock, folder, 5.0)  # made again: a run of its own
    assert [each.seconds for each in read_invocations(folder)] == [5.0]


def test_what_was_made_from_something_else_does_not_count(clock: Clock, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        spend(clock, tmp_path / "train", 40.0, origin="a", ends=False)
    spend(clock, tmp_path / "train", 10.0, origin="b")
    assert [each.seconds for each in read_invocations(tmp_path / "train")] == [10.0]


def test_a_killed_stage_has_written_down_its_time(tmp_path: Path) -> None:
    program = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from pi0rl import invocations\n"
        "invocations.BEAT_SECONDS = 0.05\n"
        "invocations.this_machine = lambda: None\n"
        "with invocations.recorded(Path(sys.argv[1]), 'a', Path(sys.argv[1])):\n"
        "    time.sleep(0.5)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "train")], env=environment())
    assert killed.returncode == -9
    with recorded(tmp_path / "train", "a", tmp_path):
        (tmp_path / "train").mkdir()
    first, second = read_invocations(tmp_path / "train")
    assert 0.2 < first.seconds < 5.0
    assert first.commit == second.commit


def test_what_an_earlier_version_recorded_is_read(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"started": "2025-01-01T10:00:00+00:00", "seconds": 12.5}\n')
    assert read_invocations(tmp_path) == (Invocation("2025-01-01T10:00:00+00:00", 12.5),)
    assert read_invocations(tmp_path / "nothing") == ()


def test_the_command_line_records_an_interrupted_training(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_sweep(tmp_path / "p"))
    monkeypatch.setenv("DVC_STAGE", "train")  # as if DVC ran it: it need not be told
    monkeypatch.setattr(cli, "die_with_parent", lambda: None)
    monkeypatch.setattr(cli, "raise_on_signals", lambda: None)
    folder = tmp_path / "p" / "runs" / "quickstart" / "train"

    def stage(seconds: float, ends: bool) -> Callable[[object], None]:
        def run(experiment: object) -> None:
            folder.mkdir(exist_ok=True)
            clock.now += seconds
            if not ends:
                raise KeyboardInterrupt

        return run

    for seconds, ends, code in ((30.0, False, 130), (12.0, True, 0)):
        monkeypatch.setitem(sys.modules, "pi0rl.stages.train", SimpleNamespace(run=stage(seconds, ends)))
        assert cli.main(["train", "quickstart"]) == code
    assert [entry["seconds"] for entry in json.loads((folder / FILE).read_text())] == [30.0, 12.0]


def test_this_machine_is_described() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert machine.cpu
    assert machine.renderer.startswith(("egl: ", "osmesa: "))
    assert str(MACHINE) == "2 cores and 1 GPU"
