"""Waiting for Ray, never silently: every wait has an end and names what it is for, and a death says whose it was."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from pi0rl import errors
from pi0rl.errors import UserError, WorkerFailed

# A chunk takes seconds, the first one of a task builds its models; an update of the full model may take an hour.
WAIT_SECONDS, UPDATE_SECONDS = 900.0, 6 * 3600.0


class WorkerDied(WorkerFailed):
    """A worker process is gone; ``actor`` is Ray's name for it."""

    def __init__(self, message: str, actor: str | None) -> None:
        super().__init__(message)
        self.actor = actor


def wait_for(refs: list[Any], what: str, seconds: float = WAIT_SECONDS) -> Any:
    """The first of ``refs`` that is ready; a WorkerFailed that names ``what`` after ``seconds`` of silence."""
    ready, _ = ray.wait(refs, num_returns=1, timeout=seconds, fetch_local=False)
    if not ready:
        raise WorkerFailed(f"waited {seconds:.0f} s for {what}; is a worker stuck? Run the same command to resume")
    return ready[0]


def fetch(ref: Any, what: str, seconds: float = WAIT_SECONDS) -> Any:
    """The value of ``ref``.

    Raises:
        WorkerDied: a worker that it needs is gone.
        WorkerFailed: nothing came for ``seconds``.
        UserError, OSError: as the worker raised them.
        RayTaskError: anything else that a worker raised.
    """
    wait_for([ref], what, seconds)
    try:
        return ray.get(ref)
    except (RayActorError, RayTaskError, ObjectLostError) as error:
        cause = _root(error)
        if isinstance(cause, UserError | OSError):
            raise cause from None
        if isinstance(cause, RayActorError):
            message = f"waiting for {what}: a worker died ({_reason(cause)}); run the same command to resume"
            raise WorkerDied(message, getattr(cause, "actor_id", None)) from error
        if isinstance(cause, ObjectLostError):
            raise WorkerFailed(
                f"waiting for {what}: a node was lost with what it held; resume on the others"
            ) from error
        raise


def fetch_all(refs: list[Any], what: str, seconds: float = WAIT_SECONDS) -> list[Any]:
    """The values of ``refs``, in their order; the first one that fails ends the wait for the others."""
    values, waiting = {}, list(refs)
    while waiting:
        ready = wait_for(waiting, what, seconds)
        values[ready] = fetch(ready, what, seconds)
        waiting.remove(ready)
    return [values[ref] for ref in refs]


def first_line(error: BaseException) -> str:
    """What happened, without the traceback that Ray puts into the text of an error."""
    return errors.first_line(_root(error))


def _root(error: BaseException) -> BaseException:
    """What the first of several workers failed with: a task fails too if what it is given is a failure."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def _reason(error: RayActorError) -> str:
    """The line of Ray's account that says how the process ended."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = next((line for line in lines if "exit" in line.lower() and ":" in line), lines[0] if lines else "")
    return told.rstrip(".")
