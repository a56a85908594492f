"""Playing a plan: env workers simulate, rollout workers act, the driver only passes references between them.

The rows are dealt to (env worker, stage) cells before the first step and every cell is a chain of its own, so neither
the order in which cells finish nor the load of the machine can change an outcome.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from pi0rl.errors import UserError, WorkerFailed
from pi0rl.libero.plan import Episode
from pi0rl.libero.slots import EpisodeResult

# A chunk takes seconds; an update of the full model may take an hour.
WAIT_SECONDS, UPDATE_SECONDS = 900.0, 6 * 3600.0


@dataclass(frozen=True)
class Cell:
    """One stage of one env worker and the rollout worker that acts for it."""

    env: Any
    rollout: Any
    stage: int


def play(
    cells: Sequence[Cell],
    rows: Sequence[Episode],
    record: frozenset[int] = frozenset(),
    on_results: Callable[[Sequence[EpisodeResult]], None] = lambda results: None,
) -> list[EpisodeResult]:
    """Play every row once; returns the results in plan order.

    Args:
        cells: who plays; row i goes to cell i modulo their number.
        rows: the plan.
        record: plan indices whose video is kept.
        on_results: called with episodes as they finish.

    Raises:
        WorkerFailed: a worker died or was silent for too long.
        UserError: not every row was completed.
    """
    shares = [rows[index :: len(cells)] for index in range(len(cells))]
    finished = [0] * len(cells)
    results: list[EpisodeResult] = []
    pending: dict[Any, tuple[int, Any]] = {}  # with a look: a chunk; without: episodes that a chunk finished

    def submit(index: int, refs: Sequence[Any]) -> None:
        look, status = refs
        pending[status] = (index, look)

    for index, (cell, share) in enumerate(zip(cells, shares, strict=True)):
        submit(index, cell.env.start.options(num_returns=2).remote(cell.stage, share, record))
    while pending:
        ref = wait_for(list(pending), "the env workers' next chunk")
        index, look = pending.pop(ref)
        cell = cells[index]
        if look is None:
            results += (fresh := fetch(ref, "an env worker"))
            on_results(fresh)
            continue
        count, running = fetch(ref, "an env worker")
        if count > finished[index]:
            pending[cell.env.results_since.remote(cell.stage, finished[index])] = (index, None)
            finished[index] = count
        actions = cell.rollout.act.remote(look)
        if running:
            submit(index, cell.env.step.options(num_returns=2).remote(cell.stage, actions))
        else:
            fetch(actions, "the rollout worker")  # it takes in the outcome of the last chunk
    return _complete(results, rows)


def _complete(results: list[EpisodeResult], rows: Sequence[Episode]) -> list[EpisodeResult]:
    """``results`` in plan order; completed = planned, or the run fails."""
    by_index = {result.index: result for result in results}
    missing = [row.index for row in rows if row.index not in by_index]
    if missing or len(results) != len(rows):
        raise UserError(
            f"{len(rows)} episodes planned, {len(results)} completed (missing: {missing[:5]}); run it again"
        )
    return [by_index[row.index] for row in rows]


def wait_for(refs: list[Any], what: str, seconds: float = WAIT_SECONDS) -> Any:
    """The first of ``refs`` that is ready; a WorkerFailed that names ``what`` after ``seconds`` of silence."""
    ready, _ = ray.wait(refs, num_returns=1, timeout=seconds, fetch_local=False)
    if not ready:
        raise WorkerFailed(f"waited {seconds:.0f} s for {what}; is a worker stuck? Run the same command to resume")
    return ready[0]


def fetch(ref: Any, what: str, seconds: float = WAIT_SECONDS) -> Any:
    """The value of ``ref``; a worker's UserError as it is, a dead worker as one line."""
    try:
        return ray.get(wait_for([ref], what, seconds))
    except RayTaskError as error:
        if isinstance(error.cause, UserError | OSError):
            raise error.cause from None
        raise
    except RayActorError as error:
        reason = str(error).strip().splitlines()[0]
        raise WorkerFailed(f"{what} died ({reason}); run the same command to go on from the last checkpoint") from error
