"""Playing an episode plan on worker processes, without Ray: nothing but the plan and the policy decides the outcome.

Workers are given rows as they finish others. A worker that dies costs the episodes it was playing; they are played
again from the start, with the same outcome, by a new worker.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait

import numpy as np

from pi0rl.errors import UserError
from pi0rl.libero.plan import Episode
from pi0rl.libero.simulation import ACTION_DIM
from pi0rl.libero.slots import IDLE, EpisodeResult, Look, SlotConfig, Slots
from pi0rl.libero.worker import REPLY_SECONDS, Worker, WorkerDied

# Actions float [M, C, 7] for what M slots show. They may depend on a slot's own row of the look only (observation,
# episode and chunk), not on who shares the batch; rows of idle slots are ignored.
Policy = Callable[[Look], np.ndarray]

# Rows that wait in a worker, so that a free slot need not wait for an answer.
_SPARE_ROWS = 1
# An episode that was at hand in this many workers' deaths is to blame for them.
_MAX_DEATHS = 5


def play_plan(
    plan: Sequence[Episode],
    policy: Policy,
    config: SlotConfig,
    workers: int,
    slots: int,
    record: frozenset[int] = frozenset(),
    on_episodes: Callable[[int], None] = lambda finished: None,
) -> list[EpisodeResult]:
    """Play every row once; returns the results in plan order.

    Args:
        plan: The episodes; their indices differ.
        policy: Called in this process, for one worker's slots at a time.
        config: How episodes are played.
        workers: Processes.
        slots: Simulations in each.
        record: Plan indices of episodes whose pictures can be drawn afterwards.
        on_episodes: Called now and then with the number of episodes finished so far.

    Raises:
        UserError: A worker could not play, or workers kept dying with the same episode.
    """
    by_index = {episode.index: episode for episode in plan}
    if len(by_index) != len(plan) or workers < 1 or slots < 1:
        raise UserError(
            f"{len(plan)} episodes, {workers} workers, {slots} slots: expected distinct indices and numbers > 0"
        )
    queue, results, deaths = deque(plan), dict[int, EpisodeResult](), Counter[int]()
    players: list[_Player] = []
    try:
        for _ in range(min(workers, math.ceil(len(plan) / slots))):
            players.append(_Player(config, slots, queue, record))
        while len(results) < len(plan):
            for player in _ready(players):
                try:
                    finished = player.advance(policy, queue)
                except WorkerDied as death:
                    players.remove(player)
                    player.worker.close()
                    deaths.update(player.rows.keys())
                    _refuse_repeated(deaths, by_index, death)
                    queue.extendleft(reversed(player.rows.values()))
                    players.append(_Player(config, slots, queue, record))
                    continue
                results.update((result.index, result) for result in finished)
                on_episodes(len(results))
    finally:
        for player in players:
            player.worker.close()
    return [results[episode.index] for episode in plan]


class PlanSlots:
    """The slots of one worker process; made there by `Worker`."""

    def __init__(self, config: SlotConfig, slots: int):
        self._slots = Slots(slots, config)

    def start(self, rows: Sequence[Episode], record: frozenset[int]) -> tuple[Look, list[EpisodeResult]]:
        """Begin; see `Slots.start`."""
        return self._slots.start(rows, record), []

    def step(self, actions: np.ndarray, rows: Sequence[Episode]) -> tuple[Look, list[EpisodeResult]]:
        """See `Slots.step`; with the look come the episodes that this step has finished."""
        before = len(self._slots.results)
        look = self._slots.step(actions, rows)
        return look, self._slots.results[before:]


@dataclass
class _Player:
    """A worker and the rows it has been given and not finished."""

    config: SlotConfig
    slots: int
    queue: deque[Episode]
    record: frozenset[int]
    rows: dict[int, Episode] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.worker = Worker(PlanSlots, (self.config, self.slots))
        self.worker.send("start", self._take(self.queue), self.record)

    def advance(self, policy: Policy, queue: deque[Episode]) -> list[EpisodeResult]:
        """Take the worker's reply and tell it how to go on, if it has anything left; returns what it has finished."""
        reply = self.worker.receive()
        if reply is None:  # it has been constructed; the first look comes next
            return []
        look, finished = reply
        for result in finished:
            del self.rows[result.index]
        fresh = self._take(queue)
        if self.rows:
            running = (look.episode != IDLE).any()
            actions = policy(look) if running else np.zeros((self.slots, 1, ACTION_DIM))
            self.worker.send("step", actions, fresh)
        return finished

    def _take(self, queue: deque[Episode]) -> list[Episode]:
        count = min(self.slots + _SPARE_ROWS - len(self.rows), len(queue))
        taken = [queue.popleft() for _ in range(count)]
        self.rows.update((episode.index, episode) for episode in taken)
        return taken


def _ready(players: Sequence[_Player]) -> list[_Player]:
    """Those whose worker has replied or died; idle ones are not waited for."""
    busy = [player for player in players if player.rows]
    ready = wait([player.worker.connection for player in busy], REPLY_SECONDS)
    if not ready:
        raise UserError(f"waited {REPLY_SECONDS:.0f} s for a simulation worker; is it stuck? Run it again")
    return [player for player in busy if player.worker.connection in ready]


def _refuse_repeated(deaths: Counter[int], plan: dict[int, Episode], death: WorkerDied) -> None:
    index, count = deaths.most_common(1)[0]
    if count >= _MAX_DEATHS:
        episode = plan[index]
        raise UserError(
            f"{count} workers died while episode {index} ({episode.suite} task {episode.task_id}, init state "
            f"{episode.init_state_id}) was at hand, the last one so: {death}"
        ) from death
