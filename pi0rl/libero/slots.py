"""Slots: simulations that play the rows of an episode plan chunk by chunk, each taking the next row when it is done.

No padding and no waiting for a horizon. Which slot plays which row depends only on the plan and the policy's actions,
never on timing, so a run can be repeated to the bit.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from pi0rl.libero.failures import ObjectTrace
from pi0rl.libero.plan import Episode, episode_init_state, episode_language, episode_task
from pi0rl.libero.rendering import PROFILES, Renderer
from pi0rl.libero.simulation import RenderState, Simulation
from pi0rl.libero.suites import Task, state_hash
from pi0rl.observation import Observation

IDLE = -1


@dataclass(frozen=True)
class SlotConfig:
    """How episodes are played.

    Attributes:
        camera_size: pixels of both square images.
        render_profile: a key of ``PROFILES``.
        settle_steps: no-op steps after a reset (openpi: 10).
        max_episode_steps: control steps per episode; None takes the task's own limit.
        suite_steps: (suite, control steps per episode) where a suite's limit is not the task's own.
        after_success: whether an episode ends at its first success, or is played on to its limit.
    """

    camera_size: int
    render_profile: Literal["reference", "fast"]
    settle_steps: int
    max_episode_steps: int | None
    suite_steps: tuple[tuple[str, int], ...] = ()
    after_success: Literal["stop", "continue"] = "stop"


@dataclass(frozen=True)
class Played:
    """The chunk that M slots have just executed; ``episode`` is IDLE where a slot executed none.

    Attributes:
        episode: int64 [M], plan indices.
        success: bool [M, C], success after each control step; False after the episode's last step.
        steps: int64 [M], control steps executed (the success step is the last one).
        done: bool [M], the episode is over (success, unless played on after it, or step limit).
    """

    episode: np.ndarray
    success: np.ndarray
    steps: np.ndarray
    done: np.ndarray


@dataclass(frozen=True)
class Look:
    """What M slots show at a chunk boundary; rows of slots without an episode are zeros.

    Attributes:
        observation: M rows.
        episode: int64 [M], plan index or IDLE.
        chunk: int64 [M], how many chunks the episode has executed.
        played: the chunk before, or None at the start.
    """

    observation: Observation
    episode: np.ndarray
    chunk: np.ndarray
    played: Played | None

    @property
    def running(self) -> int:
        """How many slots still have an episode."""
        return int((self.episode != IDLE).sum())


@dataclass(frozen=True)
class Footage:
    """All that an episode's pictures depend on; they are drawn when it is over, so that recording costs microseconds.

    Attributes:
        states: after settling and after every control step.
        success: whether the goal held in each of them.
        looks: indices of those that the policy was shown.
    """

    states: tuple[RenderState, ...]
    success: tuple[bool, ...]
    looks: tuple[int, ...]


@dataclass(frozen=True)
class EpisodeResult:
    """How one episode ended.

    Attributes:
        index: its row in the plan.
        success: whether the goal was reached at some step.
        steps: control steps played.
        final_state: hash of the physical state at the end: two runs agree to the bit if these agree.
        footage: what its video is drawn from, if it was asked for.
        success_at_end: whether the goal held at the last step.
        seconds: wall time from its reset to its end, other slots' turns included.
        failure: the kind of failure (``pi0rl.libero.failures``); empty for a success.
        error: why it has no outcome, if its simulation failed whenever it was tried; None: it was played to its end.
    """

    index: int
    success: bool
    steps: int
    final_state: str
    footage: Footage | None = None
    success_at_end: bool = False
    seconds: float = 0.0
    failure: str = ""
    error: str | None = None


@dataclass
class _Slot:
    """One slot and the episode it plays."""

    simulation: Simulation | None = None
    episode: Episode | None = None
    chunks: int = 0
    steps: int = 0
    succeeded: bool = False
    trace: ObjectTrace | None = None
    started: float = 0.0
    states: list[RenderState] = field(default_factory=list)
    success: list[bool] = field(default_factory=list)
    looks: list[int] = field(default_factory=list)


class Slots:
    """M slots of one process. ``start`` a list of rows, then ``step`` with actions until no slot is running."""

    def __init__(self, count: int, config: SlotConfig) -> None:
        self._slots = [_Slot() for _ in range(count)]
        self._config = config
        self._renderer = Renderer(config.camera_size, PROFILES[config.render_profile])
        self._free: dict[tuple[Task, int], list[Simulation]] = {}
        self._queue: deque[Episode] = deque()
        self._record: frozenset[int] = frozenset()
        self.results: list[EpisodeResult] = []
        self.seconds = {"reset": 0.0, "simulate": 0.0, "render": 0.0}

    def start(self, rows: Sequence[Episode], record: frozenset[int] = frozenset()) -> Look:
        """Begin a list of rows; ``record`` names the plan indices whose footage is kept."""
        self._queue = deque(rows)
        self._record = record
        self.results = []
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        return self._look(None)

    def step(self, actions: np.ndarray, rows: Sequence[Episode] = ()) -> Look:
        """Execute one chunk per running slot; ``actions`` is float [M, C, 7]; ``rows`` join those waiting."""
        self._queue.extend(rows)
        count, chunk_length = actions.shape[:2]
        played = Played(
            episode=np.array([IDLE if slot.episode is None else slot.episode.index for slot in self._slots]),
            success=np.zeros((count, chunk_length), dtype=bool),
            steps=np.zeros(count, dtype=np.int64),
            done=np.zeros(count, dtype=bool),
        )
        for row, slot in enumerate(self._slots):
            if slot.episode is None:
                continue
            success = self._execute(slot, actions[row])
            played.success[row, : len(success)] = success
            played.steps[row] = len(success)
            if self._stops(success[-1]) or slot.steps >= self._limit(slot.episode):
                played.done[row] = True
                self._finish(slot, success[-1])
        return self._look(played)

    def _limit(self, episode: Episode) -> int:
        limit = self._config.max_episode_steps or dict(self._config.suite_steps).get(episode.suite)
        return limit or episode_task(episode).max_episode_steps

    def _stops(self, success: bool) -> bool:
        return success and self._config.after_success == "stop"

    def _execute(self, slot: _Slot, actions: np.ndarray) -> list[bool]:
        """Step until success, the step limit or the chunk's end."""
        assert slot.simulation is not None
        assert slot.episode is not None
        assert slot.trace is not None
        started = time.perf_counter()
        success: list[bool] = []
        for action in actions[: self._limit(slot.episode) - slot.steps]:
            success.append(slot.simulation.step(action))
            slot.trace.record()
            slot.steps += 1
            slot.succeeded |= success[-1]
            if slot.episode.index in self._record:
                slot.states.append(slot.simulation.render_state())
                slot.success.append(success[-1])
            if self._stops(success[-1]):
                break
        slot.chunks += 1
        self.seconds["simulate"] += time.perf_counter() - started
        return success

    def _finish(self, slot: _Slot, success_at_end: bool) -> None:
        assert slot.simulation is not None
        assert slot.episode is not None
        assert slot.trace is not None
        footage = Footage(tuple(slot.states), tuple(slot.success), tuple(slot.looks)) if slot.states else None
        final = state_hash(np.concatenate(([0.0], slot.simulation.qpos, slot.simulation.qvel)))
        self.results.append(
            EpisodeResult(
                index=slot.episode.index,
                success=slot.succeeded,
                steps=slot.steps,
                final_state=final,
                footage=footage,
                success_at_end=success_at_end,
                seconds=time.perf_counter() - slot.started,
                failure="" if slot.succeeded else slot.trace.failure(),
            )
        )
        self._free[(slot.simulation.task, slot.episode.seed)].append(slot.simulation)
        slot.simulation = slot.episode = slot.trace = None

    def _next_episode(self, slot: _Slot) -> None:
        if not self._queue:
            return
        started = time.perf_counter()
        episode = self._queue.popleft()
        task = episode_task(episode)
        free = self._free.setdefault((task, episode.seed), [])
        slot.simulation = free.pop() if free else Simulation(task, episode.seed)
        slot.simulation.reset(episode_init_state(episode), self._config.settle_steps)
        slot.episode, slot.chunks, slot.steps = episode, 0, 0
        recorded = episode.index in self._record
        slot.states = [slot.simulation.render_state()] if recorded else []
        slot.success = [slot.simulation.success()] if recorded else []
        slot.looks = []
        slot.succeeded, slot.trace, slot.started = False, ObjectTrace(slot.simulation), started
        self.seconds["reset"] += time.perf_counter() - started

    def _look(self, played: Played | None) -> Look:
        """Give every free slot the next row, then show what all of them see."""
        for slot in self._slots:
            if slot.episode is None:
                self._next_episode(slot)
        started = time.perf_counter()
        count, size = len(self._slots), self._config.camera_size
        base = np.zeros((count, size, size, 3), dtype=np.uint8)
        wrist = np.zeros_like(base)
        state = np.zeros((count, 8), dtype=np.float32)
        prompts = [""] * count
        for row, slot in enumerate(self._slots):
            if slot.simulation is None or slot.episode is None:
                continue
            task, render_state = slot.simulation.task, slot.simulation.render_state()
            base[row] = self._renderer.render(task, slot.episode.seed, render_state, "agentview")
            wrist[row] = self._renderer.render(task, slot.episode.seed, render_state, "robot0_eye_in_hand")
            state[row] = slot.simulation.state()
            slot.looks.append(slot.steps)
            prompts[row] = episode_language(slot.episode)
        self.seconds["render"] += time.perf_counter() - started
        return Look(
            observation=Observation(base, wrist, state, tuple(prompts)),
            episode=np.array([IDLE if slot.episode is None else slot.episode.index for slot in self._slots]),
            chunk=np.array([slot.chunks for slot in self._slots]),
            played=played,
        )
