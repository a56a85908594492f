"""``pi0rl evaluate --checkpoint``: an exam has its own folder, and nothing that was played is lost or played twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest

from pi0rl.cli import main
from pi0rl.evaluation.evaluator import Play
from pi0rl.libero.plan import Episode
from pi0rl.libero.slots import EpisodeResult
from pi0rl.policy.sources import Source
from pi0rl.policy.weights import sha256
from pi0rl.stages import evaluate_checkpoint

EVALUATIONS = Path("runs/evaluations")


class Players:
    """In place of simulators: even episodes succeed. Keeps what was played; ``left`` episodes more, then Ctrl-C."""

    def __init__(self) -> None:
        self.checkpoints: list[Path] = []
        self.episodes = 0
        self.left = 10**9

    @contextmanager
    def open(self, cluster: object, config: object, checkpoint: Path) -> Iterator[Play]:
        self.checkpoints.append(checkpoint)

        def play(
            rows: Sequence[Episode],
            seed: int,
            record: frozenset[int],
            on_results: Callable[[Sequence[EpisodeResult]], None],
        ) -> None:
            for row in () if record else rows:  # their videos are not tested here
                if self.left == 0:
                    raise KeyboardInterrupt
                self.left, self.episodes = self.left - 1, self.episodes + 1
                solved = row.index % 2 == 0
                on_results([EpisodeResult(row.index, solved, 8, "end", failure="" if solved else "timeout")])

        yield play


@pytest.fixture
def players(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Players:
    """An empty working folder with a checkpoint in runs/mine/train/policy."""
    monkeypatch.chdir(tmp_path)
    players = Players()
    monkeypatch.setattr(evaluate_checkpoint, "open_play", players.open)
    policy = Path("runs/mine/train/policy")
    policy.mkdir(parents=True)
    (policy / "model.safetensors").write_bytes(b"weights")
    return players


def evaluate(*arguments: str, checkpoint: str = "runs/mine/train/policy") -> int:
    """Ten episodes per suite, split and seed."""
    return main(["evaluate", "--checkpoint", checkpoint, "--set", "episodes_per_task=1", *arguments])


def test_another_exam_has_another_folder_and_the_same_is_played_once(
    players: Players, capsys: pytest.CaptureFixture[str]
) -> None:
    exams = (
        ("--suites", "libero_goal"),
        ("--suites", "libero_spatial"),
        ("--suites", "libero_goal", "--split", "held_out"),
        ("--suites", "libero_goal", "--split", "both"),
        ("--suites", "libero_goal", "--seeds", "1"),
    )
    for exam in exams:
        assert evaluate(*exam) == 0
    name = "mine-train-default-episodes_per_task-1"
    assert {folder.name for folder in EVALUATIONS.iterdir()} == {
        f"{name}-goal-official-0",
        f"{name}-spatial-official-0",
        f"{name}-goal-held_out-0",
        f"{name}-goal-both-0",
        f"{name}-goal-official-1",
    }
    both = pd.read_parquet(EVALUATIONS / f"{name}-goal-both-0" / "episodes.parquet")
    assert both.groupby("split").size().to_dict() == {"held_out": 10, "official": 10}
    played, printed = players.episodes, capsys.readouterr().out
    assert evaluate(*exams[0]) == 0
    results, note = capsys.readouterr().out.rsplit("\n\n", 1)
    assert players.episodes == played
    assert printed.startswith(results)
    assert note == f"Played before: {EVALUATIONS}/{name}-goal-official-0. Delete it to play it again.\n"


def test_what_another_evaluation_has_left_is_refused(players: Players, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (("--output", "out", "--suites", suite) for suite in ("libero_goal", "libero_spatial"))
    players.left = 4
    assert evaluate(*one) == 130
    capsys.readouterr()
    players.left = 10**9
    assert evaluate(*other) == 2
    assert ".out.parts: an unfinished evaluation of another checkpoint or exam" in capsys.readouterr().err
    assert evaluate(*one) == 0
    assert players.episodes == 10
    table = Path("out/episodes.parquet").read_bytes()
    assert evaluate(*other) == 2
    Path("runs/mine/train/policy/model.safetensors").write_bytes(b"trained on")
    assert evaluate(*one) == 2
    exam, checkpoint = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pi0rl: error")]
    assert "--output out: holds an evaluation that differs in suites, expected a new folder" in exam
    assert "--output out: holds an evaluation that differs in checkpoint, expected a new folder" in checkpoint
    assert Path("out/episodes.parquet").read_bytes() == table
    assert players.episodes == 10


@pytest.mark.parametrize("given", ["org/name@main", "dvc:https://example.org/a/b#runs/policy"])
def test_a_checkpoint_from_elsewhere_is_resolved_once_and_recorded_by_commit_and_digest(
    given: str, players: Players, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, asked = Path("runs/mine/train/policy"), list[str]()

    def found(source: str) -> Source:
        asked.append(source)
        return Source(policy, "dvc" if source.startswith("dvc:") else "hub", source.partition("@")[0], "main", "c0ffee")

    monkeypatch.setattr(evaluate_checkpoint, "resolve", found)
    assert evaluate("--suites", "libero_goal", checkpoint=given) == 0
    assert (asked, players.checkpoints) == ([given], [policy])
    (folder,) = EVALUATIONS.iterdir()
    checkpoint = json.loads((folder / "evaluation.json").read_text())["checkpoint"]
    assert (checkpoint["location"], checkpoint["commit"]) == (given.partition("@")[0], "c0ffee")
    assert checkpoint["sha256"] == {"model.safetensors": sha256(policy / "model.safetensors")}
    assert ("to get the same again, set --checkpoint org/name@c0ffee" in capsys.readouterr().out) == ("@" in given)
    (policy / "model.safetensors").write_bytes(b"the branch has moved")
    assert evaluate("--suites", "libero_goal", checkpoint=given) == 2
    assert "holds an evaluation that differs in checkpoint" in capsys.readouterr().err


def test_a_long_name_is_cut_and_stays_its_own() -> None:
    suites = tuple(f"libero_{base}_{change}" for base in ("spatial", "goal", "10") for change in ("lan", "swap") * 5)
    requests = [
        evaluate_checkpoint.Request("org/name@main", order, "openpi", (), "official", (0,), None, 1)
        for order in (suites, suites[::-1], suites[:1])
    ]
    *long, short = [evaluate_checkpoint.default_output(request).name for request in requests]
    assert len(set(long)) == 2
    assert all(len(name) < 200 for name in long)
    assert short == "org-name-main-openpi-spatial_lan-official-0"


@pytest.mark.parametrize("workers", ["0", "-2", "two"])
def test_workers_are_a_positive_number(workers: str, players: Players, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate("--workers", workers)
    assert f"argument --workers: {workers}: expected a positive whole number" in capsys.readouterr().err
