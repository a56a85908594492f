"""The benchmark of imitation: its table, and LeRobot's loop on the same network where LeRobot is installed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from test_shared_sft import demos  # noqa: F401

from benchmarks import sft as benchmark
from pi0rl.errors import UserError
from pi0rl.sft.demonstrations import load


def test_lerobot_trains_the_same_network(demos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """LeRobot needs other versions of nearly everything: name a Python that has lerobot[pi,training] to run this."""
    python = os.environ.get("PI0RL_LEROBOT_PYTHON")
    if python is None:
        pytest.skip("PI0RL_LEROBOT_PYTHON names no Python that has lerobot[pi,training]")
    monkeypatch.setattr(benchmark, "UNTIMED", 1)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    demonstrations = load(demos)
    policy = benchmark.make_policy(demonstrations)
    benchmark.write_for_lerobot(policy, demonstrations, demos, 4, tmp_path)
    other = benchmark.LeRobot(python, tmp_path, batch=4, workers=0, threads=1)
    assert other.described["loss"] < 1e-4
    rows = benchmark.measure(policy, demonstrations, {"LeRobot": other}, batch=4, rounds=2, steps=2)
    other.close()
    assert [row["side"] for row in rows] == ["pi0rl", "LeRobot"] * 2
    theirs = rows[1]
    assert 0 < theirs["loading"] + theirs["updating"] <= theirs["seconds"]


def test_the_table_takes_ratios_within_rounds(demos: Path, tmp_path: Path) -> None:  # noqa: F811
    demonstrations = load(demos)
    policy = benchmark.make_policy(demonstrations)
    (row,) = benchmark.measure(policy, demonstrations, {}, batch=4, rounds=1, steps=1)
    assert row["seconds"] > 0
    described = {"machine": {"cores": 2}, "parameters": 900_000, "frames": 100, "tasks": 10}
    described |= {"batch": 4, "rounds": 2, "steps": 5}
    rows = [{"side": "pi0rl", "round": number, "seconds": seconds} for number, seconds in enumerate((1.0, 2.0))]
    alone = benchmark.markdown(described | {"sides": ["pi0rl"], "rows": rows})
    assert "| pi0rl | 15.0 |  |  |" in alone
    assert "LeRobot was not compared" in alone
    theirs = [{"side": "LeRobot", "round": number, "seconds": 4.0, "loading": 1.0} for number in range(2)]
    lerobot = {"versions": {"lerobot": "0.6.1"}, "parameters": 1_000_000, "loss": 1e-6}
    both = benchmark.markdown(described | {"sides": ["pi0rl", "LeRobot"], "rows": rows + theirs, "lerobot": lerobot})
    assert "| LeRobot | 5.0 | 25% | 3.00 x [2.00, 4.00] |" in both
    with pytest.raises(UserError, match=r"--lerobot false: LeRobot's training did not run \(no message\)"):
        benchmark.LeRobot("false", tmp_path, 4, 0, 1)


def test_a_wrong_python_ends_in_one_line(
    demos: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [
        "--lerobot",
        str(tmp_path / "none"),
        "--demos",
        str(demos),
        "--output",
        str(tmp_path),
        "--threads",
        "1",
    ]
    monkeypatch.setattr("sys.argv", ["sft.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code == 2
    expected = (
        f"sft.py: error: --lerobot {tmp_path}/none: cannot be started (No such file or directory); name a Python\n"
    )
    assert capsys.readouterr().err.splitlines(keepends=True)[-1] == expected  # after progress
