"""Plans on worker processes: the outcome depends neither on their number nor on their fate."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pi0rl.errors import UserError
from pi0rl.libero import playing
from pi0rl.libero.plan import Episode
from pi0rl.libero.playing import play_plan
from pi0rl.libero.slots import EpisodeResult, Look, SlotConfig, Slots

CONFIG = SlotConfig(camera_size=32, render_profile="fast", settle_steps=2, max_episode_steps=12)
PLAN = tuple(
    Episode(index, "libero_goal", 7, "official", index, seed=0) if index % 2 else
    Episode(index, "libero_spatial", 0, "official", index, seed=0)
    for index in range(8)
)  # fmt: skip


def policy(look: Look) -> np.ndarray:
    """Depends on what a slot shows, its episode and its chunk, like a seeded policy."""
    actions = []
    for row, episode in enumerate(look.episode):
        seen = int(look.observation.base_image[row].sum())
        rng = np.random.default_rng([abs(int(episode)), int(look.chunk[row]), seen])
        actions.append(rng.uniform(-1, 1, (5, 7)))
    return np.stack(actions)


@pytest.fixture(scope="module")
def expected() -> list[EpisodeResult]:
    """Played in this process by one slot."""
    slots = Slots(1, CONFIG)
    look = slots.start(PLAN)
    while look.running:
        look = slots.step(policy(look))
    results = [replace(result, seconds=0.0) for result in sorted(slots.results, key=lambda result: result.index)]
    assert len({result.final_state for result in results}) == len(PLAN)
    return results


def test_workers_killed_at_random_change_nothing(
    expected: list[EpisodeResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    hired: list[playing.Worker] = []
    killed, rng = [], random.Random(0)

    class Watched(playing.Worker):
        def __init__(self, *arguments: Any, **named: Any):
            super().__init__(*arguments, **named)
            hired.append(self)

    def killing_policy(look: Look) -> np.ndarray:
        alive = [worker for worker in hired if worker.process.poll() is None]
        if len(killed) < 3 and rng.random() < 0.4:
            victim = rng.choice(alive)
            victim.process.kill()
            killed.append(victim)
        return policy(look)

    monkeypatch.setattr(playing, "Worker", Watched)
    counts: list[int] = []
    results = play_plan(PLAN, killing_policy, CONFIG, workers=2, slots=2, on_episodes=counts.append)
    assert [replace(result, seconds=0.0) for result in results] == expected
    assert len(killed) == 3
    assert counts[-1] == len(PLAN)
    assert all(worker.process.poll() is not None for worker in hired)


def test_an_episode_that_kills_its_workers_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    hired: list[playing.Worker] = []

    class Doomed(playing.Worker):
        def __init__(self, *arguments: Any, **named: Any):
            super().__init__(*arguments, **named)
            self.process.kill()
            hired.append(self)

    monkeypatch.setattr(playing, "Worker", Doomed)
    with pytest.raises(UserError, match=r"5 workers died while episode 0 \(libero_spatial task 0, init state 0\)"):
        play_plan(PLAN[:1], policy, CONFIG, workers=1, slots=1)
    assert len(hired) == 5


def test_footage_holds_every_step_and_look() -> None:
    slots = Slots(2, replace(CONFIG, max_episode_steps=7))
    look = slots.start(PLAN[:2], record=frozenset({1}))
    while look.running:
        look = slots.step(policy(look))
    footage = {result.index: result.footage for result in slots.results}
    assert footage[0] is None
    assert footage[1] is not None
    assert len(footage[1].states) == len(footage[1].success) == 8
    assert footage[1].looks == (0, 5)


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="expected distinct indices"):
        play_plan((PLAN[0], PLAN[0]), policy, CONFIG, workers=1, slots=1)
