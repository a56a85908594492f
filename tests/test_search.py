"""A search: its budget, pruning, and how it goes on after an interruption; its trainings are a line of arithmetic."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from projects import make_sweep

import flows.search
from flows.experiment import Watch
from flows.points import Outcome
from flows.search import run_search
from pi0rl.errors import UserError
from pi0rl.experiment import Experiment
from pi0rl.files import replace_text
from pi0rl.sweeps import Sweep

BEST = 1e-4  # the learning rate that learns most, e times better than one e times as far away
SPACE = {"actor.optim.lr": {"low": 1e-6, "high": 1e-2, "log": True}, "algorithm.update_epoch": {"choices": [2, 4]}}


class Trainings:
    """In place of the stages: four iterations whose success depends on the learning rate."""

    def __init__(self) -> None:
        self.ran: list[float] = []
        self.trouble: dict[int, BaseException] = {}  # by the number of the training, from 0

    def __call__(self, prefix: str, *parts: Experiment, watch: Watch | None = None) -> None:
        point = parts[-1]
        lr = point.params.actor.optim.lr
        self.ran.append(lr)
        if trouble := self.trouble.pop(len(self.ran) - 1, None):
            raise trouble
        lines = ["iteration,env/success_once"]
        for iteration in range(4):
            lines.append(f"{iteration},{iteration / 4 * math.exp(-abs(math.log(lr / BEST)))}")
            point.stage_dir("train").mkdir(parents=True, exist_ok=True)
            replace_text(point.stage_dir("train") / "metrics.csv", "\n".join(lines) + "\n")
            if watch is not None:
                watch(f"train: iteration {iteration + 1}/4, 0:01")
        point.report_dir.mkdir(parents=True, exist_ok=True)
        replace_text(point.report_dir / "results.json", "{}")


@pytest.fixture
def trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainings:
    monkeypatch.chdir(make_sweep(tmp_path / "p"))
    made = Trainings()
    monkeypatch.setattr(flows.search, "run_experiments", made)
    return made


@pytest.mark.parametrize("strategy", ["random", "bayesian"])
def test_it_spends_its_budget_and_gives_hopeless_trials_up(trainings: Trainings, strategy: str) -> None:
    outcomes = run_search("s", _plan(strategy=strategy, trials=24, prune_after=1))
    assert len(trainings.ran) == 24
    finished = [_lr(outcome) for outcome in outcomes]
    assert 3 <= len(finished) < 24
    assert _nearest(trainings.ran) in finished  # the best one is never given up


def test_a_bayesian_search_comes_closer_to_the_best(trainings: Trainings) -> None:
    run_search("s", _plan(strategy="bayesian", trials=40))
    distances = [abs(math.log(lr / BEST)) for lr in trainings.ran[-15:]]
    blind = math.log(100) / 2  # the mean distance of a draw from the space
    assert sum(distances) / 15 < 0.6 * blind


def test_cut_off_it_goes_on_with_the_same_params(trainings: Trainings) -> None:
    trainings.trouble = {2: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        run_search("s", _plan(trials=5))
    outcomes = run_search("s", _plan(trials=5))
    assert trainings.ran[3] == trainings.ran[2]
    assert len(outcomes) == len(set(trainings.ran)) == 5  # those of the first call are compared, too
    assert len(run_search("s", _plan(trials=5))) == 5
    assert len(trainings.ran) == 6  # the third call found everything done
    assert len(run_search("s", _plan(trials=6))) == 6
    assert len(trainings.ran) == 7


def test_a_failed_trial_is_said_and_tried_again_by_the_next_call(trainings: Trainings) -> None:
    trainings.trouble = {1: UserError("train: no GL driver")}
    outcomes = run_search("s", _plan(trials=3))
    assert [outcome.error for outcome in outcomes] == ["", "train: no GL driver", ""]
    assert len(trainings.ran) == 3
    outcomes = run_search("s", _plan(trials=3))
    assert [outcome.error for outcome in outcomes] == ["", "", ""]
    assert trainings.ran[3:] == [trainings.ran[1]]


def test_other_params_are_another_search(trainings: Trainings) -> None:
    run_search("s", _plan(trials=2))
    run_search("s", _plan(trials=2, overrides={"runner.max_epochs": 3}))
    assert len(trainings.ran) == 4


def test_a_metric_that_is_not_there_is_said(trainings: Trainings) -> None:
    (outcome,) = run_search("s", _plan(trials=1, metric="env/succes"))
    assert outcome.error == "search.metric env/succes: the training writes iteration, env/success_once"


def _plan(overrides: dict[str, Any] | None = None, **search: Any) -> Sweep:
    text = {"experiment": "quickstart", "overrides": overrides or {}, "search": {"space": SPACE, **search}}
    return Sweep.model_validate(text)


def _lr(outcome: Outcome) -> float:
    return outcome.experiment.params.actor.optim.lr


def _nearest(rates: list[float]) -> float:
    return min(rates, key=lambda lr: abs(math.log(lr / BEST)))
