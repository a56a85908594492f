"""The benchmark of the scripted expert: its tables, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import expert as benchmark
from benchmarks.expert import TaskResult, as_markdown


def test_what_was_not_played_is_a_dash() -> None:
    results = [
        TaskResult("libero_object", 0, "pick up the soup", "official", 2, (90, 110), ()),
        TaskResult("libero_object", 0, "pick up the soup", "held_out", 2, (), (0, 1)),
        TaskResult("libero_goal", 3, "open the drawer", "official", 2, (50,), (1,)),
    ]
    lines = as_markdown(results).splitlines()
    assert "| libero_object | 1 of 10 | 100.0% | 2/2 (task 0) | 0.0% | 0/2 (task 0) |" in lines
    assert "| libero_goal | 1 of 10 | 50.0% | 1/2 (task 3) | - | - |" in lines
    assert "| 0 | pick up the soup | 2/2 | 100.0 | 0/2 | - |" in lines
    assert "| 3 | open the drawer | 1/2 | 50.0 | - | - |" in lines
    assert "| | **all** | **1/2** | | - | |" in lines


@pytest.mark.parametrize("states", [0, 51])
def test_more_states_than_there_are_end_in_one_line(
    states: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--suites", "libero_goal", "--split", "official", "--states", str(states), "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["expert.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said == f"expert.py: error: --states {states}: libero_goal task 0 has 50 official ones, expected 1 to 50\n"
