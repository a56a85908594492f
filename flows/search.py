"""A search over params: trials one after the other, each told what the ones before it reached (Optuna).

The study is kept beside the points (``study.log``), so an interrupted search goes on; a trial that was cut off is tried
again with the same params.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import optuna
import pandas as pd
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from flows.experiment import Watch
from flows.points import Outcome, run_experiments
from pi0rl.errors import UserError
from pi0rl.experiment import Experiment
from pi0rl.provenance import text_hash
from pi0rl.sweeps import Choice, Point, Range, Search, Sweep, experiments, make_point, sweep_dir


class Pruned(Exception):
    """A trial that is given up: below the median of the others at the same iteration."""


def run_search(name: str, plan: Sweep) -> list[Outcome]:
    """Run trials until there are ``plan.search.trials``; returns those that finished or failed, not the pruned ones.

    Raises:
        UserError: a metric that the training does not write, or a search over more than one seed.
    """
    search = plan.search
    assert search is not None
    if len(plan.seeds) > 1:
        raise UserError(f"sweep {name}: a search runs one seed; list one in seeds, and run the best point with others")
    folder = sweep_dir(name)
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name=name,
        storage=JournalStorage(JournalFileBackend(str(folder / "study.log"))),
        direction="maximize",
        load_if_exists=True,
        sampler=_sampler(search),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=search.prune_after or 0),
    )
    for trial in study.trials:
        if trial.state == TrialState.RUNNING:  # cut off: its folder goes on where it stopped
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial(trial.params, skip_if_exists=False)
    outcomes: dict[str, Outcome] = {}
    while _ended(study) < search.trials:
        trial = study.ask()
        point = _point(plan, search, trial)
        chain = experiments(name, plan, point)
        print(f"sweep {name}: trial {_ended(study) + 1}/{search.trials}, {point.name}", flush=True)
        watch = _watch(chain[-1], search, trial) if search.prune_after is not None else None
        try:
            run_experiments(f"{point.name} ", *chain, watch=watch)
            study.tell(trial, _score(chain[-1], search))
            outcomes[point.name] = Outcome(point, chain[-1], "")
        except Pruned:
            study.tell(trial, state=TrialState.PRUNED)
            print(f"sweep {name}: {point.name} given up, below the others", flush=True)
        except UserError as error:
            trial.set_user_attr("error", str(error))
            study.tell(trial, state=TrialState.FAIL)
            outcomes[point.name] = Outcome(point, chain[-1], str(error))
    return list(outcomes.values())


def _ended(study: optuna.Study) -> int:
    """Trials that count: finished, pruned or failed by themselves, not those that were cut off."""
    done = (TrialState.COMPLETE, TrialState.PRUNED)
    return sum(trial.state in done or "error" in trial.user_attrs for trial in study.trials)


def _sampler(search: Search) -> optuna.samplers.BaseSampler:
    sampler = optuna.samplers.RandomSampler if search.strategy == "random" else optuna.samplers.TPESampler
    return sampler(seed=search.seed)


def _point(plan: Sweep, search: Search, trial: optuna.Trial) -> Point:
    """The trial's params as a point, named by them, so that the same params find the same folder."""
    values = {key: _suggest(trial, key, space) for key, space in search.space.items()}
    label = f"trial-{text_hash(json.dumps(values, sort_keys=True))[:6]}"
    point = make_point(plan, [("trial", label, values)], plan.seeds[0])
    return replace(point, coordinates=values | {"seed": plan.seeds[0]})


def _suggest(trial: optuna.Trial, key: str, space: Choice | Range) -> Any:
    if isinstance(space, Choice):
        return trial.suggest_categorical(key, space.choices)
    if isinstance(space.low, int) and isinstance(space.high, int):
        return trial.suggest_int(key, space.low, space.high, log=space.log)
    return trial.suggest_float(key, space.low, space.high, log=space.log)


def _watch(experiment: Experiment, search: Search, trial: optuna.Trial) -> Watch:
    """Report every new iteration of the training to the study; raises Pruned where it says so."""
    reported = 0

    def watch(line: str) -> None:
        nonlocal reported
        if not line.startswith("train: "):
            return
        values = _column(experiment, search)
        for step in range(reported, len(values)):
            trial.report(_recent(values[: step + 1], search), step)
        reported = len(values)
        if trial.should_prune():
            raise Pruned

    return watch


def _score(experiment: Experiment, search: Search) -> float:
    return _recent(_column(experiment, search), search)


def _recent(values: list[float], search: Search) -> float:
    last = values[-search.window :]
    return sum(last) / len(last)


def _column(experiment: Experiment, search: Search) -> list[float]:
    path = experiment.stage_dir("train") / "metrics.csv"
    if not path.is_file():
        return []
    table = pd.read_csv(path)
    if search.metric not in table:
        raise UserError(f"search.metric {search.metric}: the training writes {', '.join(table.columns)}")
    return table[search.metric].astype(float).tolist()
