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
from pi0rl.experiment import Experiment, open_experiment
from pi0rl.params import params_hash
from pi0rl.provenance import text_hash
from pi0rl.sweeps import Choice, Point, Range, Search, Sweep, experiments, make_point, sweep_dir


class Pruned(Exception):
    """A trial that is given up: below the median of the others at the same iteration."""


def run_search(name: str, plan: Sweep) -> list[Outcome]:
    """Run trials until there are ``plan.search.trials``; returns those that finished or failed, not the pruned ones.

    Trials of earlier calls count, and are among what is returned; those that failed then are tried again.

    Raises:
        UserError: a metric that the training does not write, or a search over more than one seed.
    """
    search = plan.search
    assert search is not None
    if len(plan.seeds) > 1:
        raise UserError(f"sweep {name}: a search runs one seed; list one in seeds, and run the best point with others")
    study = _open_study(name, plan, search)
    outcomes = _finished_before(study, name, plan, search)
    earlier = len(study.trials)
    study.sampler = _sampler(search, earlier)
    _try_again(study)
    while (ended := _ended(study, earlier)) < search.trials:
        trial = study.ask()
        point = _point(plan, {key: _suggest(trial, key, space) for key, space in search.space.items()})
        chain = experiments(name, plan, point)
        print(f"sweep {name}: trial {ended + 1}/{search.trials}, {point.name}", flush=True)
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


def _open_study(name: str, plan: Sweep, search: Search) -> optuna.Study:
    """The study of this search. Other params or another space make another one; more trials go on with it."""
    folder = sweep_dir(name)
    folder.mkdir(parents=True, exist_ok=True)
    base = open_experiment(plan.experiment, make_point(plan, [], plan.seeds[0]).overrides).params
    decides = [params_hash(base), search.model_dump(mode="json", exclude={"trials"})]
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        study_name=f"{name}-{text_hash(json.dumps(decides, sort_keys=True))[:8]}",
        storage=JournalStorage(JournalFileBackend(str(folder / "study.log"))),
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=search.prune_after or 0),
    )


def _finished_before(study: optuna.Study, name: str, plan: Sweep, search: Search) -> dict[str, Outcome]:
    """The trials that earlier calls finished, by their points' names; a report that is gone is made again."""
    outcomes: dict[str, Outcome] = {}
    for trial in study.get_trials(states=[TrialState.COMPLETE]):
        point = _point(plan, {key: trial.params[key] for key in search.space})
        chain = experiments(name, plan, point)
        if not (chain[-1].report_dir / "results.json").is_file():
            run_experiments(f"{point.name} ", *chain)
        outcomes[point.name] = Outcome(point, chain[-1], "")
    return outcomes


def _try_again(study: optuna.Study) -> None:
    """Put the params of trials that were cut off or failed first in line, unless they have been tried again since."""
    for trial in study.get_trials(states=[TrialState.RUNNING]):  # its folder goes on where it stopped
        study.tell(trial.number, state=TrialState.FAIL)
    settled = [
        trial.system_attrs.get("fixed_params", trial.params) for trial in study.trials if trial.state != TrialState.FAIL
    ]
    for trial in study.get_trials(states=[TrialState.FAIL]):
        if trial.params and trial.params not in settled:
            study.enqueue_trial(trial.params)
            settled.append(trial.params)


def _ended(study: optuna.Study, earlier: int) -> int:
    """Trials that count: finished, pruned, or failed by themselves in this call, not the first ``earlier`` ones."""
    done = (TrialState.COMPLETE, TrialState.PRUNED)
    return sum(
        trial.state in done or ("error" in trial.user_attrs and trial.number >= earlier) for trial in study.trials
    )


def _sampler(search: Search, earlier: int) -> optuna.samplers.BaseSampler:
    """Seeded anew for what comes after ``earlier`` trials: begun again as it was, it would draw their params again."""
    sampler = optuna.samplers.RandomSampler if search.strategy == "random" else optuna.samplers.TPESampler
    return sampler(seed=search.seed + earlier)


def _point(plan: Sweep, values: dict[str, Any]) -> Point:
    """A trial's params as a point, named by them, so that the same params find the same folder."""
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
