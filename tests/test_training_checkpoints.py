"""Checkpoints of a training: which are kept, which are refused, and which one is gone on from."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tiny_training import QUICKSTART

from pi0rl.cluster.checkpoints import STATE, VALIDATION, Checkpoints
from pi0rl.params import load_params
from pi0rl.rl.guards import GuardState
from pi0rl.stages.train import ORIGIN, origin_of_run, reason_to_begin_anew


def begin(folder: Path, start: str = "digest of the start") -> Checkpoints:
    (folder / "start").mkdir(parents=True, exist_ok=True)
    (folder / "start" / "config.json").write_text(start)
    return Checkpoints(folder / "checkpoints", folder / "start", keep_last=2)


def save(folder: Path) -> None:
    (folder / "policy").mkdir()
    (folder / "policy" / "model.safetensors").write_bytes(b"weights" * 9)
    (folder / "optimizer.safetensors").write_bytes(b"moments" * 9)


def guard(*scores: float) -> GuardState:
    return GuardState(scores=dict(enumerate(scores)))


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = begin(tmp_path)
    for done in range(1, 6):
        checkpoints.write(save, done, guard(*[0.5, 0.9, 0.4, 0.3, 0.2][:done]))
    assert written(tmp_path) == ["iteration_00001", "iteration_00004", "iteration_00005"]
    state = guard(0.5, 0.9, 0.4, 0.3, 0.2)
    assert checkpoints.latest(pytest.fail).iterations_done == 5
    assert checkpoints.latest(pytest.fail).guard == state
    assert checkpoints.best(state, 4).iterations_done == 1
    assert checkpoints.best(guard(1.0), 4).policy == tmp_path / "start"


def test_the_best_of_a_validated_run_stays(tmp_path: Path) -> None:
    checkpoints, said = begin(tmp_path), []
    state = GuardState(scores={1: 0.9, 2: 0.1}, validations={0: 0.2, 2: 0.6, 4: 0.4})
    for done in (2, 4):
        checkpoints.write(save, done, state)
    checkpoints.keep_best(tmp_path / "best", said.append)
    assert json.loads((tmp_path / "best" / VALIDATION).read_text()) == {"iterations": 2, "success": 0.6}
    assert (tmp_path / "best" / "model.safetensors").is_file()
    assert said == [f"validated best: the policy of 2 iterations, 60.0%; kept in {tmp_path / 'best'}"]
    checkpoints.write(save, 4, guard(0.1, 0.9))
    checkpoints.keep_best(tmp_path / "none", said.append)
    assert not (tmp_path / "none").exists()


def test_what_an_interruption_left_is_gone_on_from_and_nothing_else(tmp_path: Path) -> None:
    checkpoints, state = begin(tmp_path), guard(0.1, 0.2, 0.9, 0.8, 0.7)
    for done in (1, 2):
        checkpoints.write(save, done, state)
    checkpoints.write_stopped(save, 3, state)
    assert written(tmp_path) == ["iteration_00001", "iteration_00002", "stopped_00003"]
    assert checkpoints.latest(pytest.fail).iterations_done == 3
    checkpoints.prune(3, state)
    assert written(tmp_path) == ["iteration_00001", "iteration_00002", "stopped_00003"]
    assert checkpoints.best(state, 3).iterations_done == 2  # though the policy after three iterations is the best
    checkpoints.write(save, 4, state)
    assert written(tmp_path) == ["iteration_00002", "iteration_00004"]
    checkpoints.write_stopped(save, 5, state)
    (tmp_path / "checkpoints" / "stopped_00005" / STATE).unlink()
    said: list[str] = []
    assert checkpoints.latest(said.append).iterations_done == 4
    assert "stopped_00005: refused" in said[0]
    checkpoints.prune(4, state)
    assert written(tmp_path) == ["iteration_00002", "iteration_00004"]


@pytest.mark.parametrize("damage", ["truncated", "missing", "no state", "other format", "renamed"])
def test_a_damaged_one_is_refused_and_the_one_before_it_used(tmp_path: Path, damage: str) -> None:
    checkpoints = begin(tmp_path)
    for done in (1, 2):
        checkpoints.write(save, done, guard(0.1, 0.2))
    last = tmp_path / "checkpoints" / "iteration_00002"
    weights, state = last / "policy" / "model.safetensors", last / STATE
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "missing":
        (last / "optimizer.safetensors").unlink()
    elif damage == "no state":
        state.write_text("")
    elif damage == "other format":
        state.write_text(json.dumps(json.loads(state.read_text()) | {"format": "old"}))
    else:
        last = last.rename(last.with_name("iteration_00007"))
    said: list[str] = []
    found = checkpoints.latest(said.append)
    assert found.iterations_done == 1
    assert len(said) == 2
    assert said[0].startswith(f"{last}: refused, ")
    assert "going on from" in said[1]
    assert checkpoints.best(guard(0.1, 0.2, 0.9), 7).iterations_done == 1  # nor does a rollback trust it
    checkpoints.prune(found.iterations_done, found.guard)
    assert written(tmp_path) == ["iteration_00001"]


def test_those_of_another_run_are_refused(tmp_path: Path) -> None:
    begin(tmp_path).write(save, 1, guard(0.1))
    said: list[str] = []
    other = begin(tmp_path, start="another policy")
    assert other.latest(said.append).policy == tmp_path / "start"
    assert "began from another policy" in said[0]
    assert "anew" in said[1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("runner.max_epochs=60", None),
        ("runner.keep_last=9", None),
        ("runner.logger.experiment_name=other", None),
        ("actor.optim.lr=0.5", r"begun with other params \(actor.optim.lr: 6e-05 -> 0.5\)"),
        ("runner.save_interval=1", "runner.save_interval: 4 -> 1"),
    ],
)
def test_what_a_run_is_gone_on_with_after_a_change(tmp_path: Path, change: str, reason: str | None) -> None:
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "config.json").write_text('{"weights_sha256": "0"}')
    folder = tmp_path / "train"
    assert reason_to_begin_anew(folder, {}) is None
    (folder / "checkpoints").mkdir(parents=True)
    began = origin_of_run(load_params(QUICKSTART), tmp_path / "sft")
    (folder / ORIGIN).write_text(json.dumps(began))
    said = reason_to_begin_anew(folder, origin_of_run(load_params(QUICKSTART, (change,)), tmp_path / "sft"))
    assert (said is None) if reason is None else re.search(reason, said or "")


def test_the_length_of_a_schedule_that_ends_with_the_run_decides_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")

    def origins(*overrides: str) -> list[object]:
        both = ((*overrides, f"runner.max_epochs={length}") for length in (20, 40))
        return [origin_of_run(load_params(QUICKSTART, each), tmp_path) for each in both]

    one, other = origins("actor.optim.lr_scheduler=cosine")
    assert one != other
    one, other = origins("actor.optim.lr_scheduler=cosine", "actor.optim.total_training_steps=40")
    assert one == other
