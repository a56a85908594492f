"""The episode plan: which episodes a run consists of, fixed as data before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from pi0rl.errors import UserError
from pi0rl.libero.suites import Task, held_out_init_states, official_init_states, suite_tasks

Split = Literal["official", "held_out"]

# About one permutation in three moves everything; where instructions repeat (LIBERO-90) far fewer do.
_DRAWS = 1000


@dataclass(frozen=True)
class Episode:
    """One row of a plan.

    Attributes:
        index: Position in the plan; noise is keyed by it.
        suite, task_id: The task.
        split, init_state_id: The init state, an index into that split's states of the task.
        seed: The simulation's seed: it decides where LIBERO puts the fixtures. One value per plan, so that all
            episodes of a task share one compiled scene.
        group: Episodes of one group share task and init state (GRPO compares them with one another).
        instruction: The task of the suite whose instruction the policy is given; None: the episode's own. Success is
            judged by the episode's own task in either case.
    """

    index: int
    suite: str
    task_id: int
    split: Split
    init_state_id: int
    seed: int
    group: int = 0
    instruction: int | None = None


def init_states(task: Task, split: Split) -> np.ndarray:
    """The init states of a split, float64 [n, state].

    Raises:
        UserError: The split is unknown or has no states for the task.
    """
    if split == "official":
        return official_init_states(task)
    if split == "held_out":
        return held_out_init_states(task)
    raise UserError(f"unknown split {split!r}: expected 'official' or 'held_out'")


def episode_task(episode: Episode) -> Task:
    """The task of an episode."""
    return suite_tasks(episode.suite)[episode.task_id]


def episode_language(episode: Episode) -> str:
    """The instruction that the policy is given."""
    instruction = episode.task_id if episode.instruction is None else episode.instruction
    return suite_tasks(episode.suite)[instruction].language


def episode_init_state(episode: Episode) -> np.ndarray:
    """The init state of an episode, float64 [state]."""
    return init_states(episode_task(episode), episode.split)[episode.init_state_id]


def evaluation_plan(suites: Sequence[str], split: Split, episodes_per_task: int, seed: int) -> tuple[Episode, ...]:
    """The first `episodes_per_task` init states of every task, task after task, each once and a group of its own.

    Raises:
        UserError: Fewer init states exist than episodes are asked for, or a name is unknown.
    """
    episodes: list[Episode] = []
    for task in (task for suite in suites for task in suite_tasks(suite)):
        _check_ids(task, split, range(episodes_per_task))
        for init_state_id in range(episodes_per_task):
            index = len(episodes)
            episodes.append(Episode(index, task.suite, task.task_id, split, init_state_id, seed, group=index))
    return tuple(episodes)


def with_permuted_instructions(plan: Sequence[Episode], seed: int) -> tuple[Episode, ...]:
    """The same episodes, each with the instruction of another task of its suite.

    Episodes of one suite and init state change instructions among all tasks of the suite: every one is given once, and
    none to the task it belongs to. Who gets which depends on (`seed`, init state) alone.

    Raises:
        UserError: A suite does not have enough different instructions.
    """
    given: dict[tuple[str, int], tuple[int, ...]] = {}
    for suite, init_state_id in dict.fromkeys((episode.suite, episode.init_state_id) for episode in plan):
        languages = [task.language for task in suite_tasks(suite)]
        given[suite, init_state_id] = _derangement(suite, languages, (seed, init_state_id))
    return tuple(
        replace(episode, instruction=given[episode.suite, episode.init_state_id][episode.task_id]) for episode in plan
    )


def _derangement(suite: str, languages: Sequence[str], key: tuple[int, ...]) -> tuple[int, ...]:
    generator = np.random.default_rng(key)
    for _ in range(_DRAWS):
        order = generator.permutation(len(languages)).tolist()
        if all(languages[other] != own for other, own in zip(order, languages, strict=True)):
            return tuple(order)
    raise UserError(
        f"{suite}: its {len(languages)} tasks have {len(set(languages))} different instructions, too few to give every "
        "task another one's; permute those of another suite"
    )


def training_plan(
    suites: Sequence[str],
    split: Split,
    episodes: int,
    group_size: int,
    seed: int,
    iteration: int,
    init_state_ids: range,
) -> tuple[Episode, ...]:
    """The episodes of one training iteration: `episodes / group_size` groups, dealt to the tasks in turn.

    Where the groups do not divide by the tasks, the next iteration goes on with the next task, so the tasks stay
    balanced over the run. A task's init states are drawn without repetition as long as they last, by a generator
    seeded with (seed, iteration, task).

    Raises:
        UserError: `episodes` is not a multiple of `group_size`, an init state does not exist, or a name is unknown.
    """
    groups = _groups(episodes, group_size)
    tasks = [task for suite in suites for task in suite_tasks(suite)]
    turns = [(iteration * groups + group) % len(tasks) for group in range(groups)]
    draws = {}
    for turn in set(turns):
        generator = np.random.default_rng((seed, iteration, turn))
        draws[turn] = iter(_draw(tasks[turn], turns.count(turn), generator, init_state_ids))
    return _in_groups([(tasks[turn], next(draws[turn])) for turn in turns], split, group_size, seed, init_state_ids)


def independent_plan(
    suites: Sequence[str],
    split: Split,
    episodes: int,
    group_size: int,
    seed: int,
    iteration: int,
    init_state_ids: range,
) -> tuple[Episode, ...]:
    """As `training_plan`, but every group draws its task and init state independently of the others, as in RLinf: tasks
    come in unequal numbers, and states repeat."""
    groups, generator = _groups(episodes, group_size), np.random.default_rng((seed, iteration))
    tasks = [task for suite in suites for task in suite_tasks(suite)]
    chosen = generator.integers(len(tasks), size=groups)
    starts = [(tasks[turn], _draw(tasks[turn], 1, generator, init_state_ids)[0]) for turn in chosen]
    return _in_groups(starts, split, group_size, seed, init_state_ids)


def _groups(episodes: int, group_size: int) -> int:
    if episodes < 1 or group_size < 1 or episodes % group_size:
        raise UserError(
            f"{episodes} episodes in groups of {group_size}: expected a positive multiple of the group size"
        )
    return episodes // group_size


def _in_groups(
    starts: Sequence[tuple[Task, int]], split: Split, group_size: int, seed: int, init_state_ids: range
) -> tuple[Episode, ...]:
    """One group per task and init state, in their order."""
    plan: list[Episode] = []
    for group, (task, init_state_id) in enumerate(starts):
        _check_ids(task, split, init_state_ids)
        for _ in range(group_size):
            plan.append(Episode(len(plan), task.suite, task.task_id, split, init_state_id, seed, group))
    return tuple(plan)


def _draw(task: Task, count: int, generator: np.random.Generator, init_state_ids: range) -> list[int]:
    if not init_state_ids:
        raise UserError(f"{task.suite} task {task.task_id}: no init states to train on; give a range that is not empty")
    rounds = -(-count // len(init_state_ids))
    drawn = np.concatenate([generator.permutation(np.array(init_state_ids)) for _ in range(rounds)])
    return [int(state) for state in drawn[:count]]


def _check_ids(task: Task, split: Split, init_state_ids: range) -> None:
    available = len(init_states(task, split))
    if init_state_ids and (min(init_state_ids) < 0 or max(init_state_ids) >= available):
        raise UserError(
            f"{task.suite} task {task.task_id}: init states {min(init_state_ids)} to {max(init_state_ids)} asked for, "
            f"{available} {split} ones exist; ask for fewer"
        )
