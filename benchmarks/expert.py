"""Plays the scripted expert on every task: successes per task and split, and how many control steps they take.

    python -m benchmarks.expert                          # the four suites, 20 init states of both splits
    python -m benchmarks.expert --suites libero_90 --states 2 --split official
    python -m benchmarks.expert --suites libero_90 --states 2 --split official --first-task 55   # cut off before it

Writes benchmarks/results/expert.json and expert.md after every task; what is not asked for keeps the results of the
last run. The expert sees no pictures, so an episode takes about half a second of one core.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from benchmarks.machine import describe_machine
from pi0rl.errors import UserError
from pi0rl.files import replace_text
from pi0rl.libero.expert import Expert
from pi0rl.libero.plan import Split, init_states
from pi0rl.libero.simulation import Simulation
from pi0rl.libero.suites import SUITES, Task, suite_tasks
from pi0rl.progress import Progress

RESULTS = Path(__file__).parent / "results"
DEFAULT_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
# What the expert is meant to reach on every task of a suite.
TARGETS = {"libero_spatial": 0.9, "libero_object": 0.9, "libero_goal": 0.8, "libero_10": 0.7}
NOT_PLAYED = "- | -"  # two cells of a table


@dataclass(frozen=True)
class TaskResult:
    """One task on one split.

    Attributes:
        suite, task_id, language, split: What was played.
        episodes: Episodes played, one for each of the first init states.
        steps: Control steps of the successful ones.
        failed: Init states of the others.
    """

    suite: str
    task_id: int
    language: str
    split: str
    episodes: int
    steps: tuple[int, ...]
    failed: tuple[int, ...]


def play(task: Task, split: Split, states: int) -> TaskResult:
    """The expert on the first init states of a task.

    Raises:
        UserError: there are not as many, or none is asked for.
    """
    available = init_states(task, split)
    if not 1 <= states <= len(available):
        raise UserError(
            f"--states {states}: {task.suite} task {task.task_id} has {len(available)} {split} ones, expected 1 to "
            f"{len(available)}"
        )
    simulation = Simulation(task)
    steps, failed = [], []
    for init_state_id in range(states):
        simulation.reset(available[init_state_id])
        expert = Expert(simulation, np.random.default_rng(0))
        for step in range(task.max_episode_steps):
            if simulation.step(expert.action()):
                steps.append(step + 1)
                break
        else:
            failed.append(init_state_id)
    return TaskResult(task.suite, task.task_id, task.language, split, states, tuple(steps), tuple(failed))


def as_markdown(results: list[TaskResult]) -> str:
    """The tables: one per suite, a row per task."""
    lines = ["# The scripted expert", "", "Successes of the episodes played, and the mean control steps of successes."]
    splits = [split for split in get_args(Split) if any(result.split == split for result in results)]
    suites = [suite for suite in SUITES if any(result.suite == suite for result in results)]
    lines += ["", "| suite | tasks played |" + "".join(f" {split} | worst task |" for split in splits)]
    lines += ["|---|---:|" + "---:|---:|" * len(splits)]
    for suite in suites:
        of_suite = [result for result in results if result.suite == suite]
        played = f"{len({result.task_id for result in of_suite})} of {len(suite_tasks(suite))}"
        cells = "".join(f" {_summary([row for row in of_suite if row.split == split])} |" for split in splits)
        lines.append(f"| {suite} | {played} |{cells}")
    for suite in suites:
        of_suite = [result for result in results if result.suite == suite]
        lines += ["", f"## {suite}", ""]
        if suite in TARGETS:
            lines += [f"Wanted on every task: {TARGETS[suite]:.0%}.", ""]
        lines += ["| task | instruction |" + "".join(f" {split} | steps |" for split in splits)]
        lines += ["|---:|---|" + "---:|---:|" * len(splits)]
        for task_id in sorted({result.task_id for result in of_suite}):
            rows = {result.split: result for result in of_suite if result.task_id == task_id}
            cells = "".join(f" {_cell(rows.get(split))} |" for split in splits)
            lines.append(f"| {task_id} | {next(iter(rows.values())).language} |{cells}")
        sums = "".join(f" {_sum([result for result in of_suite if result.split == split])} | |" for split in splits)
        lines.append(f"| | **all** |{sums}")
        solved = {result.task_id for result in of_suite if result.steps}
        lines += ["", f"Tasks solved at least once: {len(solved)} of {len({row.task_id for row in of_suite})}."]
    return "\n".join(lines) + "\n"


def _cell(result: TaskResult | None) -> str:
    if result is None:
        return NOT_PLAYED
    mean = f"{np.mean(result.steps):.1f}" if result.steps else "-"
    return f"{len(result.steps)}/{result.episodes} | {mean}"


def _summary(results: list[TaskResult]) -> str:
    if not results:
        return NOT_PLAYED
    worst = min(results, key=lambda result: len(result.steps) / result.episodes)
    share = sum(len(result.steps) for result in results) / sum(result.episodes for result in results)
    return f"{share:.1%} | {len(worst.steps)}/{worst.episodes} (task {worst.task_id})"


def _sum(results: list[TaskResult]) -> str:
    if not results:
        return "-"
    return f"**{sum(len(result.steps) for result in results)}/{sum(result.episodes for result in results)}**"


def load(path: Path) -> list[TaskResult]:
    """The results of earlier runs."""
    if not path.exists():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))["tasks"]
    return [TaskResult(**{**row, "steps": tuple(row["steps"]), "failed": tuple(row["failed"])}) for row in rows]


def save(folder: Path, results: list[TaskResult]) -> str:
    """Write both files; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    results.sort(key=lambda result: (SUITES.index(result.suite), result.task_id, result.split))
    record = {"machine": describe_machine(), "targets": TARGETS, "tasks": [asdict(result) for result in results]}
    replace_text(folder / "expert.json", json.dumps(record, indent=1) + "\n")
    table = as_markdown(results)
    replace_text(folder / "expert.md", table)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", default=DEFAULT_SUITES, choices=SUITES, metavar="SUITE")
    parser.add_argument("--states", type=int, default=20, help="init states per task and split")
    parser.add_argument("--split", nargs="+", default=list(get_args(Split)), choices=get_args(Split))
    parser.add_argument("--first-task", type=int, default=0, help="the task of each suite to begin with")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the two files")
    arguments = parser.parse_args()
    tasks = [task for suite in arguments.suites for task in suite_tasks(suite) if task.task_id >= arguments.first_task]
    units = [(task, split) for task in tasks for split in arguments.split]
    if not units:
        parser.error(f"--first-task {arguments.first_task}: {', '.join(arguments.suites)} has no such task")
    results, table = load(arguments.output / "expert.json"), ""
    progress = Progress("expert", len(units), "task")
    for done, (task, split) in enumerate(units, start=1):
        try:
            played = play(task, split, arguments.states)
        except UserError as error:
            parser.exit(2, f"{parser.prog}: error: {error}\n")
        key = (task.suite, task.task_id, split)
        results = [row for row in results if (row.suite, row.task_id, row.split) != key] + [played]
        table = save(arguments.output, results)
        line = f"{task.suite} {task.task_id} {split}: {len(played.steps)}/{played.episodes}"
        progress.update(done, line, always=True)
    print(table)


if __name__ == "__main__":
    main()
