"""Playing a plan: env workers simulate, rollout workers act, the driver only passes references between them.

The rows are dealt to (env worker, stage) cells before the first step and every cell is a chain of its own, so neither
the order in which cells finish nor the load of the machine can change an outcome. Noise is keyed by episode and chunk:
what a dead env worker was playing is played again by its successor, to the same outcome.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pi0rl.cluster.waiting import WorkerDied, fetch, wait_for
from pi0rl.errors import UserError, WorkerFailed
from pi0rl.libero.plan import Episode
from pi0rl.libero.slots import EpisodeResult

# An env worker whose successors died this often without finishing an episode is not replaced any more.
MAX_DEATHS = 3


class EnvPool(Protocol):
    """The env workers by number."""

    def worker(self, number: int) -> Any:
        """Ray's handle of the worker that has this number now."""

    def replace(self, number: int) -> None:
        """Put a new process in its place."""


@dataclass(frozen=True)
class Cell:
    """One stage of one env worker (by number) and the rollout worker that acts for it."""

    env: int
    rollout: Any
    stage: int


@dataclass
class _Course:
    """How far a cell has come: its rows; their results; how many its present env worker has announced; the last call
    of its rollout worker."""

    rows: Sequence[Episode]
    results: dict[int, EpisodeResult] = field(default_factory=dict)
    announced: int = 0
    acting: Any = None

    @property
    def missing(self) -> list[Episode]:
        return [row for row in self.rows if row.index not in self.results]


def play(
    cells: Sequence[Cell],
    envs: EnvPool,
    rows: Sequence[Episode],
    record: frozenset[int] = frozenset(),
    on_results: Callable[[Sequence[EpisodeResult]], None] = lambda results: None,
) -> list[EpisodeResult]:
    """Play every row once; returns the results in plan order.

    Args:
        cells: who plays; row i goes to cell i modulo their number.
        envs: the env workers.
        rows: the plan.
        record: plan indices whose video is kept.
        on_results: called with episodes as they finish.

    Raises:
        WorkerFailed: a rollout worker died, an env worker died again and again, or one was silent for too long.
        UserError: not every row was completed.
    """
    return _Playing(cells, envs, rows, record, on_results).run()


class _Playing:
    """A plan on its way."""

    def __init__(
        self,
        cells: Sequence[Cell],
        envs: EnvPool,
        rows: Sequence[Episode],
        record: frozenset[int],
        on_results: Callable[[Sequence[EpisodeResult]], None],
    ) -> None:
        self._cells, self._envs, self._rows, self._record, self._on_results = cells, envs, rows, record, on_results
        self._courses = [_Course(rows[index :: len(cells)]) for index in range(len(cells))]
        self._pending: dict[Any, tuple[int, Any]] = {}  # with a look: a chunk; without: what a chunk has finished
        self._deaths = dict.fromkeys((cell.env for cell in cells), 0)

    def run(self) -> list[EpisodeResult]:
        for index in range(len(self._cells)):
            self._start(index)
        while self._pending:
            ref = wait_for(list(self._pending), self._waiting())
            index, look = self._pending.pop(ref)
            try:
                answer = fetch(ref, f"env worker {self._cells[index].env}")
            except WorkerDied as death:
                if death.actor != _identity(self._env(index)):
                    raise
                self._replace(self._cells[index].env, death)
                continue
            if look is None:
                self._take(index, answer)
            else:
                self._advance(index, look, *answer)
        return _complete([result for course in self._courses for result in course.results.values()], self._rows)

    def _env(self, index: int) -> Any:
        return self._envs.worker(self._cells[index].env)

    def _start(self, index: int) -> None:
        self._courses[index].announced = 0
        start = self._env(index).start.options(num_returns=2)
        self._submit(index, start.remote(self._cells[index].stage, self._courses[index].missing, self._record))

    def _submit(self, index: int, refs: Sequence[Any]) -> None:
        look, status = refs
        self._pending[status] = (index, look)

    def _take(self, index: int, results: Sequence[EpisodeResult]) -> None:
        self._courses[index].results.update((result.index, result) for result in results)
        self._deaths[self._cells[index].env] = 0
        self._on_results(results)

    def _advance(self, index: int, look: Any, finished: int, running: int) -> None:
        """A chunk is played: ask for what it has finished, and let the policy look."""
        cell, course, env = self._cells[index], self._courses[index], self._env(index)
        if finished > course.announced:
            self._pending[env.results_since.remote(cell.stage, course.announced)] = (index, None)
            course.announced = finished
        course.acting = cell.rollout.act.remote(look)
        if running:
            self._submit(index, env.step.options(num_returns=2).remote(cell.stage, course.acting))
        else:
            fetch(course.acting, "a rollout worker")  # it takes in the outcome of the last chunk

    def _replace(self, number: int, death: WorkerDied) -> None:
        """Forget what the dead worker had begun, and begin it again on a new one."""
        self._deaths[number] += 1
        indices = [index for index, cell in enumerate(self._cells) if cell.env == number]
        missing = [row for index in indices for row in self._courses[index].missing]
        if self._deaths[number] >= MAX_DEATHS:
            episodes = ", ".join(f"{row.index} ({row.suite} task {row.task_id})" for row in missing[:4])
            raise WorkerFailed(
                f"env worker {number} died {self._deaths[number]} times without finishing an episode, the last one so: "
                f"{death}; it was to play episode {episodes}"
            ) from death
        print(f"{death}: env worker {number} is replaced, {len(missing)} episodes are played again", file=sys.stderr)
        self._pending = {ref: value for ref, value in self._pending.items() if value[0] not in indices}
        self._envs.replace(number)
        for index in indices:
            cell, course = self._cells[index], self._courses[index]
            if course.acting is not None:
                fetch(course.acting, "a rollout worker")
            fetch(cell.rollout.forget.remote([row.index for row in course.missing]), "a rollout worker")
            if course.missing:
                self._start(index)

    def _waiting(self) -> str:
        envs = sorted({self._cells[index].env for index, _ in self._pending.values()})
        done = sum(len(course.results) for course in self._courses)
        return (
            f"the next chunk of env workers {', '.join(map(str, envs))} or the rollout workers' actions for it "
            f"({done} of {len(self._rows)} episodes are finished)"
        )


def _identity(handle: Any) -> str:
    return handle._actor_id.hex()


def _complete(results: list[EpisodeResult], rows: Sequence[Episode]) -> list[EpisodeResult]:
    """``results`` in plan order; completed = planned, or the run fails."""
    by_index = {result.index: result for result in results}
    missing = [row.index for row in rows if row.index not in by_index]
    if missing or len(results) != len(rows):
        raise UserError(
            f"{len(rows)} episodes planned, {len(results)} completed (missing: {missing[:5]}); run it again"
        )
    return [by_index[row.index] for row in rows]
