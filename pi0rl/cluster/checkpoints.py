"""Checkpoints of a training run: written whole, verified before they are used, the last few and the best kept.

One that an interruption has left between the regular ones is only gone on from: were it a place to go back to, or the
best, an interrupted run would end otherwise than one that was not. The next regular one takes its place.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pi0rl.errors import UserError
from pi0rl.files import replace_directory
from pi0rl.policy.weights import sha256
from pi0rl.rl.guards import GuardState, best_of, guard_state, guard_state_json

# In a checkpoint beside what the actor writes: its digests, and what else decides how the run goes on.
STATE = "state.json"
FORMAT = "pi0rl-training-1"
# In the best policy's folder when the run is over: how many iterations made it, and its success where it was validated.
VALIDATION = "validation.json"
REGULAR, STOPPED = "iteration", "stopped"


@dataclass(frozen=True)
class Checkpoint:
    """A policy of the run, verified.

    Attributes:
        policy: the policy's folder.
        directory: the folder with policy, optimiser and state; None at the start of a run.
        iterations_done: how many iterations made it.
        guard: what the guards remembered then.
    """

    policy: Path
    directory: Path | None
    iterations_done: int
    guard: GuardState


class Checkpoints:
    """The checkpoints below ``directory`` of a run that began from the policy in ``start``."""

    def __init__(self, directory: Path, start: Path, keep_last: int) -> None:
        self._directory, self._keep_last = directory, keep_last
        self._start = Checkpoint(start, None, 0, GuardState())
        self._begun_from = hashlib.sha256((start / "config.json").read_bytes()).hexdigest()

    def latest(self, notice: Callable[[str], None]) -> Checkpoint:
        """The one with the most iterations that can be trusted, without any the start of the run; ``notice`` is told
        of those that are refused."""
        refused = False
        for path in sorted([*self._paths(), *self._paths(STOPPED)], key=_number, reverse=True):
            try:
                found = self._read(path)
            except UserError as error:
                notice(str(error))
                refused = True
                continue
            if refused:
                notice(f"going on from {path}, {found.iterations_done} iterations are done")
            return found
        if refused:
            notice("no other checkpoint is there: training begins anew")
        return self._start

    def best(self, guard: GuardState, done: int) -> Checkpoint:
        """Of the start and the trustworthy checkpoints of at most ``done`` iterations, the one that
        :func:`pi0rl.rl.guards.best_of` chooses."""
        candidates = {0: self._start}
        for path in self._paths():
            if _number(path) <= done:
                try:
                    candidates[_number(path)] = self._read(path)
                except UserError:
                    continue  # one that cannot be read is no place to go back to; a resume says why
        chosen = best_of(guard, candidates)
        return candidates[0 if chosen is None else chosen]

    def keep_best(self, target: Path, notice: Callable[[str], None]) -> None:
        """Copy the policy that validated best to ``target``, with its score beside it (``VALIDATION``).

        Nothing where the run was not validated: one iteration's success in training says too little.
        """
        last = self.latest(notice)
        validations = last.guard.validations
        best = self.best(last.guard, last.iterations_done)
        if best.iterations_done not in validations:
            return
        success = validations[best.iterations_done]
        with replace_directory(target) as temporary:
            shutil.copytree(best.policy, temporary, dirs_exist_ok=True)
            score = {"iterations": best.iterations_done, "success": success}
            (temporary / VALIDATION).write_text(json.dumps(score, indent=1) + "\n")
        notice(f"validated best: the policy of {best.iterations_done} iterations, {success:.1%}; kept in {target}")

    def write(self, save: Callable[[Path], None], done: int, guard: GuardState) -> None:
        """Write a checkpoint under a temporary name and rename it; only then old ones go.

        Args:
            save: writes ``policy/`` and the optimiser into the folder it is given.
        """
        self._write(REGULAR, save, done, guard)
        self.prune(done, guard)

    def write_stopped(self, save: Callable[[Path], None], done: int, guard: GuardState) -> None:
        """The same between the regular ones, to go on from after an interruption; none goes for it."""
        self._write(STOPPED, save, done, guard)

    def _write(self, kind: str, save: Callable[[Path], None], done: int, guard: GuardState) -> None:
        target = self._directory / f"{kind}_{done:05d}"
        with replace_directory(target) as temporary:
            save(temporary)
            state = {
                "format": FORMAT,
                "iterations_done": done,
                "begun_from": self._begun_from,
                "sha256": {name: sha256(temporary / name) for name in _files(temporary)},
                "guard": guard_state_json(guard),
            }
            (temporary / STATE).write_text(json.dumps(state, indent=1) + "\n")

    def prune(self, done: int, guard: GuardState) -> None:
        """Keep the last ``keep_last`` of at most ``done`` iterations and the best; later ones were refused."""
        paths = {_number(path): path for path in self._paths()}
        numbers = [number for number in paths if number <= done]
        kept = {*numbers[-self._keep_last :], best_of(guard, [0, *numbers])}
        gone = [path for number, path in paths.items() if number not in kept]
        for path in [*gone, *(path for path in self._paths(STOPPED) if _number(path) != done)]:
            shutil.rmtree(path)

    def _paths(self, kind: str = REGULAR) -> list[Path]:
        """By iterations; unfinished ones have a temporary name and do not count."""
        return sorted(self._directory.glob(f"{kind}_[0-9][0-9][0-9][0-9][0-9]"))

    def _read(self, path: Path) -> Checkpoint:
        """Raises UserError where something is missing, truncated, changed, or from another run."""
        try:
            state = json.loads((path / STATE).read_text())
            done, guard, digests = int(state["iterations_done"]), guard_state(state["guard"]), dict(state["sha256"])
            known = state["format"] == FORMAT
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: refused, {STATE} is missing or damaged ({error!r})") from error
        if not known or done != _number(path):
            raise UserError(f"{path}: refused, {STATE} says format {state['format']} and {done} iterations")
        if state.get("begun_from") != self._begun_from:
            raise UserError(f"{path}: refused, it belongs to a run that began from another policy")
        for name, digest in digests.items():
            if not (path / name).is_file() or sha256(path / name) != digest:
                raise UserError(f"{path}: refused, {name} is missing, truncated or changed since it was written")
        return Checkpoint(path / "policy", path, done, guard)


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _number(path: Path) -> int:
    return int(path.name.rpartition("_")[2])
