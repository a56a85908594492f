"""The points of a sweep as something to run, and how they ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flows.experiment import Watch, run_stages
from pi0rl.experiment import Experiment, freeze
from pi0rl.sweeps import Point


@dataclass(frozen=True)
class Outcome:
    """How a point ended; ``error`` is empty where it finished."""

    point: Point
    experiment: Experiment
    error: str


def run_experiments(
    prefix: str,
    *parts: Experiment,
    watch: Watch | None = None,
    variables: Mapping[str, str] | None = None,
) -> None:
    """Freeze and run ``parts`` one after the other; ``prefix`` begins their lines."""
    for part in parts:
        freeze(part)
        run_stages(part, prefix, watch, variables)
