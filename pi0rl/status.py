"""``pi0rl status``: which stages are up to date, by DVC's own judgement."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from pi0rl.errors import UserError
from pi0rl.experiment import Experiment, changed_params


def print_status(experiment: Experiment) -> int:
    """Print a line per stage; returns 0 if all are up to date, else 1."""
    if experiment.frozen and not experiment.dvc_file.is_file():
        print(f"{experiment.reference}: not begun; `pi0rl run` with the same arguments begins it")
        return 1
    if changes := changed_params(experiment):
        listed = ", ".join(changes)
        print(f"{experiment.reference}: lies there with other params ({listed}); `pi0rl run` would change them")
    stale = _dvc_status(experiment)
    recorded = _recorded(experiment)
    width = max(map(len, experiment.stages))
    for stage in experiment.stages:
        verdict = _verdict(stale.get(stage)) if stage in recorded else "to do: has not run yet"
        print(f"{stage:<{width}}  {verdict}")
    return 1 if stale or changes else 0


def _dvc_status(experiment: Experiment) -> dict[str, Any]:
    """stage -> what changed, for the stages that are not up to date."""
    dvc = str(Path(sys.executable).parent / "dvc")
    file = str(experiment.dvc_file.relative_to(experiment.root))
    result = subprocess.run([dvc, "status", "--json", file], cwd=experiment.root, capture_output=True, text=True)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        raise UserError(f"dvc status {file}: {lines[-1]}")
    # DVC names the stages of another folder runs/again/dvc.yaml:train
    return {name.rpartition(":")[2]: changes for name, changes in json.loads(result.stdout).items()}


def _recorded(experiment: Experiment) -> set[str]:
    """The stages whose last run DVC has recorded; of others it would only list all their inputs as modified."""
    lock = experiment.dvc_file.with_name("dvc.lock")
    return set(yaml.safe_load(lock.read_text())["stages"]) if lock.is_file() else set()


def _verdict(changes: list[dict[str, dict[str, Any] | str]] | None) -> str:
    if changes is None:
        return "up to date"
    reasons = []
    for change in changes:
        for kind, items in change.items() if isinstance(change, dict) else ():
            paths = _flat(items) if isinstance(items, dict) else [str(items)]
            reasons += [f"{path} ({kind.removeprefix('changed ')})" for path in paths]
    return f"to do: {', '.join(reasons)}"


def _flat(items: dict[str, Any]) -> list[str]:
    """``params.yaml: {seed: modified}`` -> ``seed modified``; ``demos: modified`` -> ``demos modified``."""
    lines = []
    for name, state in items.items():
        lines += [f"{key} {how}" for key, how in state.items()] if isinstance(state, dict) else [f"{name} {state}"]
    return lines
