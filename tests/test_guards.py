"""Guards over a training run: when it has collapsed, and which checkpoint is the best."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pi0rl.errors import UserError
from pi0rl.rl.config import GuardConfig
from pi0rl.rl.guards import (
    GuardState,
    best_of,
    guard_state,
    guard_state_json,
    learning_rate_scale,
    observe,
    rolled_back,
    validated,
)

CONFIG = GuardConfig(collapse_drop=0.2, collapse_window=2, collapse_kl=1.0)


def played(successes: list[float], state: GuardState | None = None, start: int = 0) -> tuple[GuardState, list[int]]:
    """The state after iterations of these successes, and the iterations in which a collapse was seen."""
    state, collapses = state or GuardState(), []
    for number, success in enumerate(successes, start):
        state, reason = observe(state, number, {"env/success_once": success}, CONFIG)
        collapses += [number] if reason else []
    return state, collapses


def test_noise_is_not_a_collapse_and_a_fall_is() -> None:
    assert played([0.5, 0.6, 0.45, 0.55, 0.3, 0.5]) == (
        GuardState(recent=(0.3, 0.5), best=0.55, scores=dict(enumerate([0.5, 0.6, 0.45, 0.55, 0.3, 0.5]))),
        [],
    )
    assert played([0.5, 0.6, 0.4, 0.2])[1] == [3]
    assert played([0.1, 0.1, 0.0, 0.0])[1] == []


def test_the_window_starts_anew_after_a_rollback() -> None:
    state, _ = played([0.5, 0.6, 0.4, 0.2])
    state = rolled_back(state, 1, 4)
    assert (state.recent, state.rollbacks) == ((), 1)
    state, collapses = played([0.5, 0.5, 0.3, 0.1], state, start=4)
    assert collapses == [7]
    assert learning_rate_scale(rolled_back(state, 1, 8), replace(CONFIG, rollback_lr_factor=0.5)) == 0.25


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"actor/max_kl": 1.5}, "KL of 1.5"),
        ({"actor/skipped_steps": 4.0, "actor/optimizer_steps": 0.0}, "no gradient"),
        ({"actor/max_kl": 0.3, "actor/skipped_steps": 1.0, "actor/optimizer_steps": 3.0}, None),
    ],
)
def test_updates_that_destroy_are_seen_at_once(metrics: dict[str, float], words: str | None) -> None:
    _, reason = observe(GuardState(), 0, {"env/success_once": 0.5, **metrics}, CONFIG)
    assert reason is None if words is None else words in str(reason)


def test_guards_can_be_switched_off() -> None:
    off = replace(CONFIG, collapse_kl=None, collapse_drop=None)
    state = GuardState(recent=(0.9,), best=0.9)
    assert observe(state, 1, {"env/success_once": 0.0, "actor/max_kl": 99.0}, off)[1] is None


def test_the_best_is_the_validated_one_and_of_equals_the_later() -> None:
    state, _ = played([0.5, 0.9, 0.9, 0.4])
    assert best_of(state, [0, 1, 2, 3]) == 2
    assert best_of(state, [0, 3, 4]) == 0
    assert best_of(state, [9]) is None
    state = validated(validated(state, 2, 0.3), 4, 0.6)
    assert best_of(state, [0, 2, 4]) == 4


def test_what_was_gone_back_to_keeps_its_validation() -> None:
    state = rolled_back(validated(GuardState(), 4, 0.6), source=4, target=9)
    assert best_of(state, [0, 4, 9]) == 9
    assert rolled_back(GuardState(), source=0, target=3).validations == {}


def test_a_state_survives_json_to_the_bit() -> None:
    state, _ = played([1 / 3, 0.7, 0.1 + 0.2])
    state = validated(rolled_back(state, 0, 3), 3, 2 / 3)
    assert guard_state(json.loads(json.dumps(guard_state_json(state)))) == state


def test_impossible_guards_are_refused() -> None:
    with pytest.raises(UserError, match="collapse_drop"):
        GuardConfig(collapse_drop=1.5)
    with pytest.raises(UserError, match="rollback_lr_factor"):
        GuardConfig(rollback_lr_factor=0.0)
