"""Sweeps: one params file that names a base experiment and what varies, expanded into points.

A point is an experiment of its own in ``runs/sweeps/<sweep>/<point>/``. Points whose params agree on everything that
decides the demonstrations, or the SFT policy, share them: those stages stand in folders of their own, named by a hash
of the params they read, and run once.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pi0rl.errors import UserError
from pi0rl.experiment import Experiment, decided_by, open_experiment, project_root
from pi0rl.params import explain

Overrides = dict[str, Any]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Choice(_Section):
    """One of the listed values."""

    choices: tuple[Any, ...] = Field(min_length=1)


class Range(_Section):
    """A number between ``low`` and ``high``, both included; whole if both ends are."""

    low: int | float
    high: int | float
    log: bool = False


class Search(_Section):
    """A search over ``space`` instead of every combination.

    Attributes:
        strategy: ``random`` or ``bayesian`` (tree-structured Parzen estimator).
        trials: how many points, the pruned ones counted in.
        metric: a column of the training's metrics.csv, averaged over its last ``window`` iterations; it is maximised.
            Held-out episodes stay out of the search: they judge its result.
        prune_after: iterations after which a trial below the median of the others is given up; None: never.
    """

    strategy: Literal["random", "bayesian"] = "bayesian"
    trials: Annotated[int, Field(gt=0)]
    metric: str = "env/success_once"
    window: Annotated[int, Field(gt=0)] = 5
    prune_after: Annotated[int, Field(gt=0)] | None = None
    seed: int = 0
    space: dict[str, Choice | Range] = Field(min_length=1)


class Sweep(_Section):
    """What ``params/sweeps/<name>.yaml`` says; every key of ``overrides``, ``axes``, ``points`` is a params key.

    Attributes:
        experiment: the base, a name in params/.
        overrides: laid over the base at every point.
        axes: a grid. An axis is a list of values for the key that names it, or a mapping from labels to overrides.
        points: a list of overrides; with axes, every entry is combined with every cell of the grid.
        seeds: every point runs once per seed.
        exclude: points to leave out: those that agree with all coordinates of an entry, ``{algorithm: grpo, seed: 1}``.
        concurrency: points at a time; left out, as many as fit the machine, see flows.room.
        search: a search in place of axes and points.
    """

    experiment: str
    overrides: Overrides = {}
    axes: dict[str, list[Any] | dict[str, Overrides]] = {}
    points: list[Overrides] = []
    seeds: list[int] = Field(default=[0], min_length=1)
    exclude: list[dict[str, Any]] = []
    concurrency: Annotated[int, Field(gt=0)] | None = None
    search: Search | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Sweep:
        if self.search is not None and (self.axes or self.points):
            raise ValueError("search stands in place of axes and points; leave one of them out")
        return self


@dataclass(frozen=True)
class Point:
    """One experiment of a sweep.

    Attributes:
        name: its folder below the sweep's.
        coordinates: axis -> label or value, and the seed: what tells it from the other points.
        overrides: ``key=value`` strings over the base experiment.
    """

    name: str
    coordinates: dict[str, Any]
    overrides: tuple[str, ...]


def load_sweep(name: str, overrides: Sequence[str] = ()) -> Sweep:
    """Read ``params/sweeps/<name>.yaml`` and lay ``key=value`` strings over every point.

    Raises:
        UserError: it names the file, the key and what was expected.
    """
    root = project_root()
    path = root / "params" / "sweeps" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in path.parent.glob("*.yaml"))) or "none"
        raise UserError(f"{os.path.relpath(path)}: no such sweep; known ones: {known}")
    try:
        sweep = Sweep.model_validate(yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise UserError(f"{os.path.relpath(path)}: not valid YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise UserError(f"{os.path.relpath(path)}: {explain(error, Sweep)}") from error
    return sweep.model_copy(update={"overrides": sweep.overrides | _read_overrides(overrides)})


def sweep_dir(name: str) -> Path:
    """``runs/sweeps/<sweep>``."""
    return project_root() / "runs" / "sweeps" / name


def sweep_report_dir(name: str) -> Path:
    """``reports/sweeps/<sweep>/comparison``, beside the points' reports."""
    return project_root() / "reports" / "sweeps" / name / "comparison"


def grid_points(sweep: Sweep) -> tuple[Point, ...]:
    """Every combination of the axes' values, the listed points and the seeds."""
    axes = [[(axis, *cell) for cell in _cells(axis, values)] for axis, values in sweep.axes.items()]
    listed = [[("point", _label(entry), entry)] for entry in sweep.points]
    combinations = [[*cells, *extra] for cells in itertools.product(*axes) for extra in (listed or [[]])]
    every = [make_point(sweep, cells, seed) for cells in combinations for seed in sweep.seeds]
    for entry in sweep.exclude:
        if not any(_agrees(point, entry) for point in every):
            raise UserError(f"sweep: exclude: {entry}: no point has these coordinates; they are axis: value, and seed")
    points = [point for point in every if not any(_agrees(point, entry) for entry in sweep.exclude)]
    if not points:
        raise UserError("sweep: exclude leaves no point")
    names = [point.name for point in points]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"sweep: two points are both called {twice[0]}; give the axis labels (label: {{key: value}})")
    return tuple(points)


def make_point(sweep: Sweep, cells: list[tuple[str, Any, Overrides]], seed: int) -> Point:
    """The point at ``cells``: axis, label, overrides."""
    overrides = dict(sweep.overrides)
    for _, _, cell in cells:
        overrides |= cell
    return Point(
        name="-".join([*(_slug(axis, label) for axis, label, _ in cells), f"seed{seed}"]),
        coordinates={axis: label for axis, label, _ in cells} | {"seed": seed},
        overrides=tuple(f"{key}={json.dumps(value)}" for key, value in (overrides | {"seed": seed}).items()),
    )


def experiments(name: str, sweep: Sweep, point: Point) -> tuple[Experiment, ...]:
    """The experiments that make ``point``, in the order they run: shared demonstrations, shared SFT, the point itself.

    Raises:
        UserError: overrides that make no valid params.
    """
    try:
        own = open_experiment(sweep.experiment, point.overrides, str(sweep_dir(name) / point.name))
    except UserError as error:
        raise UserError(f"sweep {name}, point {point.name}: {error}") from error
    shared: list[Experiment] = []
    folders: dict[str, Path] = {}
    for stage in own.stages:
        if stage in ("demos", "fetch", "sft"):
            output = "demos" if stage == "demos" else "sft"
            folder = f"sweeps/{name}/shared-{output}-{decided_by(own, own.stages[: own.stages.index(stage) + 1])}"
            folders[f"{output}_dir"] = own.root / "runs" / folder / output
            run_dir = own.root / "runs" / folder
            shared.append(
                replace(
                    own,
                    name=folder,
                    run_dir=run_dir,
                    report_dir=own.root / "reports" / folder,
                    dvc_file=run_dir / "dvc.yaml",
                    stages=(stage,),
                )
            )
    rest = tuple(stage for stage in own.stages if stage not in ("demos", "fetch", "sft"))
    return tuple(replace(each, **folders) for each in (*shared, replace(own, stages=rest)))


def describe(sweep: Sweep, points: Sequence[Point]) -> str:
    """What ``pi0rl sweep NAME --list`` shows: per point what makes it that point, or the space of a search."""
    if sweep.search is not None:
        space = [f"  {key}: {values}" for key, values in sweep.search.space.items()]
        heading = f"{sweep.search.strategy} search, {sweep.search.trials} trials, {sweep.search.metric} is maximised"
        return "\n".join([heading, *space])
    lists = [point.overrides for point in points]
    common = [each for each in lists[0] if len(lists) > 1 and all(each in overrides for overrides in lists)]
    own = [[each for each in overrides if each not in common] for overrides in lists]
    lines = ["  ".join([point.name, *overrides]) for point, overrides in zip(points, own, strict=True)]
    return "\n".join([*lines, *(["at every point: " + "  ".join(common)] if common else [])])


def workers_of(experiment: Experiment) -> int:
    """Cores that an experiment keeps busy: its most numerous workers."""
    params = experiment.params
    return max(params.demos.workers, params.env.train.workers, params.env.eval.workers)


def _read_overrides(texts: Sequence[str]) -> Overrides:
    """``key=value`` strings, the values as YAML."""
    pairs = [text.partition("=") for text in texts]
    if bad := next((key for key, separator, _ in pairs if not separator), None):
        raise UserError(f"overrides: {bad}: expected key=value, for example runner.max_epochs=4")
    return {key.strip(): yaml.safe_load(value) for key, _, value in pairs}


def _agrees(point: Point, entry: dict[str, Any]) -> bool:
    return entry.items() <= point.coordinates.items()


def _cells(axis: str, values: list[Any] | dict[str, Overrides]) -> list[tuple[Any, Overrides]]:
    if isinstance(values, dict):
        return list(values.items())
    return [(value, {axis: value}) for value in values]


def _label(entry: Overrides) -> str:
    return "-".join(_slug(key, value) for key, value in entry.items())


def _slug(axis: str, label: Any) -> str:
    """A part of a folder name: the label alone where it is a word, else with the key's last part before it."""
    text = re.sub(r"[^A-Za-z0-9._-]+", "_", str(label)).strip("_.")
    return text if isinstance(label, str) else f"{axis.rpartition('.')[2]}{text}"
