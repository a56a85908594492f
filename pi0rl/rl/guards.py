"""Guards over a whole training run: has it collapsed, and from where does it go on then?

What guards one update (the ratio of 1 at its start, the stop at ``target_kl``, skipped steps) is in
:mod:`pi0rl.rl.update`. Here are pure functions over what the iterations report; the loop carries their state from
iteration to iteration and in its checkpoints, so that a resumed run decides the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pi0rl.rl.config import GuardConfig


@dataclass(frozen=True)
class GuardState:
    """What is remembered between iterations.

    Attributes:
        recent: success of the last iterations' training episodes, at most ``collapse_window`` of them.
        best: the best mean of a whole window so far; 0 before the first.
        rollbacks: how often the run has gone back.
        scores: iterations done -> success in training of the policy that they made (with exploration noise).
        validations: iterations done -> success of the same policy where it was validated (without noise).
    """

    recent: tuple[float, ...] = ()
    best: float = 0.0
    rollbacks: int = 0
    scores: Mapping[int, float] = field(default_factory=dict)
    validations: Mapping[int, float] = field(default_factory=dict)


def observe(
    state: GuardState, iteration: int, metrics: Mapping[str, float], config: GuardConfig
) -> tuple[GuardState, str | None]:
    """Take in what iteration ``iteration`` (0, 1, ...) reported: its episodes, then its update.

    Returns:
        The new state, and why the run has collapsed (None: it has not).
    """
    success = metrics["env/success_once"]
    recent = (*state.recent, success)[-config.collapse_window :]
    mean, whole = sum(recent) / len(recent), len(recent) == config.collapse_window
    scores = {**state.scores, iteration: success}
    after = replace(state, recent=recent, scores=scores, best=max(state.best, mean) if whole else state.best)
    steps = metrics.get("actor/optimizer_steps", 0.0) + metrics.get("critic/optimizer_steps", 0.0)
    if metrics.get("actor/skipped_steps", 0.0) > 0.0 and steps == 0.0:
        return after, "no gradient of the update was finite"
    max_kl = metrics.get("actor/max_kl", 0.0)
    if config.collapse_kl is not None and max_kl > config.collapse_kl:
        return (
            after,
            f"the update moved the policy by a KL of {max_kl:.3g} (algorithm.collapse_kl={config.collapse_kl:g})",
        )
    if config.collapse_drop is not None and whole and mean < state.best - config.collapse_drop:
        return after, (
            f"success fell from {state.best:.2f} to {mean:.2f} (means of {config.collapse_window} iterations, "
            f"algorithm.collapse_drop={config.collapse_drop:g})"
        )
    return after, None


def rolled_back(state: GuardState, source: int, target: int) -> GuardState:
    """The state after going back once more: the window starts anew, and the policy after ``target`` iterations is the
    one after ``source``, with its validation."""
    known = {target: state.validations[source]} if source in state.validations else {}
    return replace(state, recent=(), rollbacks=state.rollbacks + 1, validations={**state.validations, **known})


def validated(state: GuardState, iterations_done: int, success: float) -> GuardState:
    """Take in the success of a validation."""
    return replace(state, validations={**state.validations, iterations_done: success})


def best_of(state: GuardState, iterations_done: Iterable[int]) -> int | None:
    """Of the policies after so many iterations the best, of equals the later one; None if none has a score.

    Validated policies are compared by their validations; without any, by the success of their training episodes.
    """
    known = state.validations or state.scores
    scored = [(known[done], done) for done in iterations_done if done in known]
    return max(scored)[1] if scored else None


def guard_state_json(state: GuardState) -> dict[str, Any]:
    """``state`` for a JSON file; :func:`guard_state` gives back the same to the bit."""
    return asdict(state)


def guard_state(tree: Mapping[str, Any]) -> GuardState:
    """The state that :func:`guard_state_json` wrote; a KeyError, TypeError or ValueError where it is something else."""
    scores, validations = (
        {int(done): float(success) for done, success in tree[name].items()} for name in ("scores", "validations")
    )
    recent = tuple(float(success) for success in tree["recent"])
    return GuardState(recent, float(tree["best"]), int(tree["rollbacks"]), scores, validations)


def learning_rate_scale(state: GuardState, config: GuardConfig) -> float:
    """Factor on all learning rates: smaller after every rollback."""
    return config.rollback_lr_factor**state.rollbacks
