"""Plays the same episodes here and in LIBERO's own environment and compares every number and every pixel.

    python -m benchmarks.exactness                                  # two tasks of every suite, about half an hour
    python -m benchmarks.exactness --suites libero_goal --tasks 3 7
    python -m benchmarks.exactness --all                            # all 290 tasks, hours

An episode has the task's full length: the expert's grasps where there is an expert, pushes into the table, saturating
moves and turns, a gripper that opens and closes. Results go to benchmarks/results/exactness.json task by task; tasks
already there are not played again unless named by `--tasks`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.reference_rollout import CAMERAS, OBSERVED
from pi0rl.errors import UserError
from pi0rl.files import replace_text
from pi0rl.libero import goal
from pi0rl.libero.compile import compiled_task, reference_variables
from pi0rl.libero.expert import Expert
from pi0rl.libero.rendering import PROFILES, Renderer
from pi0rl.libero.simulation import RenderState, Simulation
from pi0rl.libero.suites import SUITES, Task, official_init_states, suite_tasks, task
from pi0rl.progress import Progress

RESULTS = Path(__file__).parent / "results" / "exactness.json"
SIZES = (128, 224, 256)
# Of each family of suites the tasks with most to go wrong: stacked bowls, doors, drawers, stoves, racks, two goals.
TELLING_TASKS = {
    "libero_spatial": (5, 3),
    "libero_object": (0, 6),
    "libero_goal": (7, 3),
    "libero_10": (9, 3),
    "libero_90": (23, 35),
}
# The share of an episode that the expert may use, and how long it may follow a chunk of the noise that comes after.
EXPERT_SHARE = 0.6
CHUNK = 10


@dataclass(frozen=True)
class Comparison:
    """What came of one episode.

    Attributes:
        suite, task_id, seed: The task, and the seed of fixtures, init state and actions.
        steps: Control steps played by both.
        numbers: How many numbers were compared (qpos, qvel, success, proprioception, site colours).
        pictures: How many pictures were compared.
        sizes: Of what sizes (pixels).
        probes: Further states whose success was compared, on both sides of every goal test.
        contacts: The largest number of contacts at the end of a step.
        success: Whether the goal was reached on the way.
        differences: What differed, as text; empty if nothing did.
    """

    suite: str
    task_id: int
    seed: int
    steps: int
    numbers: int
    pictures: int
    probes: int
    contacts: int
    success: bool
    differences: tuple[str, ...]
    sizes: tuple[int, ...] = ()


def compare(scene: Task, seed: int, steps: int, sizes: tuple[int, ...], looks: int = 3) -> Comparison:
    """Play one episode on both sides, with `looks` moments of which both cameras' pictures are taken in all `sizes`."""
    states = official_init_states(scene)
    init_state = states[seed % len(states)]
    actions = episode_actions(scene, seed, init_state, steps)
    probes = probing_states(scene, init_state)
    rows = np.linspace(0, steps, looks).astype(int)
    given = {"init_state": init_state, "actions": actions, "probes": probes, "looks": rows, "sizes": np.array(sizes)}
    reference = _reference(scene, seed, given)

    differences = []
    simulation = Simulation(scene, seed)
    simulation.reset(init_state, settle_steps=0)
    views: dict[int, RenderState] = {}
    contacts = numbers = 0
    for row in range(steps + 1):
        success = simulation.step(actions[row - 1]) if row else simulation.success()
        robot = simulation.proprioception()
        ours = {"qpos": simulation.qpos, "qvel": simulation.qvel, "success": np.array(success)}
        for name, value in (ours | {name: robot[name] for name in OBSERVED}).items():
            numbers += value.size
            if not np.array_equal(value, reference[name][row]):
                gap = np.abs(value.astype(float) - reference[name][row]).max()
                differences.append(f"{name} at step {row} by {gap:.1e}")
        contacts = max(contacts, simulation.data.ncon)
        if row in rows:
            views[row] = simulation.render_state()
    simulation.step(actions[0])  # the next picture shows the sites as the last compared step left them
    numbers += reference["site_rgba"][-1].size
    if not np.array_equal(simulation.render_state().site_rgba, reference["site_rgba"][-1]):
        differences.append("site colours at the end")
    for index, probe in enumerate(probes):
        simulation.reset(probe, settle_steps=0)
        if simulation.success() != reference["probed"][index]:
            differences.append(f"success of probe {index}")
    for size in sizes:
        differences += _different_pictures(scene, seed, views, size, reference)
    return Comparison(
        suite=scene.suite,
        task_id=scene.task_id,
        seed=seed,
        steps=steps,
        numbers=numbers,
        pictures=len(views) * len(CAMERAS) * len(sizes),
        sizes=sizes,
        probes=len(probes),
        contacts=contacts,
        success=bool(reference["success"].any()),
        differences=tuple(differences),
    )


def telling_tasks(suite: str) -> tuple[int, int]:
    """The tasks of a suite that stand for it when there is no time for all."""
    return TELLING_TASKS[max((base for base in TELLING_TASKS if suite.startswith(base)), key=len)]


def episode_actions(scene: Task, seed: int, init_state: np.ndarray, steps: int) -> np.ndarray:
    """float64 [steps, 7]: the expert until the goal or EXPERT_SHARE of the steps, then contact-rich noise."""
    rng = np.random.default_rng(seed)
    simulation = Simulation(scene, seed)
    simulation.reset(init_state, settle_steps=0)
    actions, expert = [], Expert(simulation, rng)
    while len(actions) < EXPERT_SHARE * steps and not simulation.success():
        actions.append(expert.action())
        simulation.step(actions[-1])
    return np.concatenate([np.reshape(actions, (-1, 7)), contact_rich_actions(rng, steps)])[:steps]


def contact_rich_actions(rng: np.random.Generator, steps: int) -> np.ndarray:
    """float64 [steps, 7]: pushes into the table, saturating moves and turns, resting rotations, a toggling gripper."""
    actions = np.empty((steps, 7))
    for start in range(0, steps, CHUNK):
        action = rng.uniform(-1.5, 1.5, 7)
        kind = (start // CHUNK) % 4
        if kind == 0:
            action[:6] = [0.2, 0.0, -1.0, 0.0, 0.0, 0.0]
        elif kind == 2:
            action[3:6] = 0.0
        actions[start : start + CHUNK] = action
        if kind == 3:
            actions[start : start + CHUNK : 2, 6] *= -1.0
    return actions


def probing_states(scene: Task, init_state: np.ndarray) -> np.ndarray:
    """States on both sides of every goal test: objects dropped around their places, joints around their thresholds."""
    simulation = Simulation(scene)
    simulation.reset(init_state, settle_steps=0)
    model, data = simulation.model, simulation.data
    probes = []
    for test in compiled_task(scene, 0).goal:
        if isinstance(test, goal.JointTest):
            for offset in (-0.1, -1e-9, 0.0, 1e-9, 0.1):
                probe = init_state.copy()
                probe[1 + np.array(test.qpos)] = test.threshold + offset
                probes.append(probe)
            continue
        moved = test.upper_body if isinstance(test, goal.OnObject) else test.body
        place = data.xpos[test.lower_body] if isinstance(test, goal.OnObject) else data.site_xpos[test.site]
        address = 1 + model.jnt_qposadr[model.body_jntadr[moved]]
        for height in (-0.02, 0.0, 0.005, 0.01, 0.02, 0.04, 0.08, 0.2):
            for aside in (0.0, 0.02, 0.04):
                probe = init_state.copy()
                probe[address : address + 3] = place + np.array([aside, 0.0, height])
                probes.append(probe)
    return np.array(probes)


def _reference(scene: Task, seed: int, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "input.npz", Path(folder) / "output.npz"
        np.savez(source, allow_pickle=False, **given)
        module = "benchmarks.reference_rollout"
        command = [sys.executable, "-m", module, str(scene.bddl_file), str(seed), str(source), str(target)]
        variables = reference_variables() | {"PYTHONPATH": os.pathsep.join(sys.path)}
        result = subprocess.run(command, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if result.returncode:
            raise UserError(
                f"LIBERO's own environment failed on {scene.suite} task {scene.task_id}: {result.stderr.strip()}"
            )
        with np.load(target) as arrays:
            return dict(arrays)


def _different_pictures(
    scene: Task, seed: int, views: dict[int, RenderState], size: int, reference: dict[str, np.ndarray]
) -> list[str]:
    renderer = Renderer(size, PROFILES["reference"])
    differences = []
    for row, view in views.items():
        for camera in CAMERAS:
            ours = renderer.render(scene, seed, view, camera)
            different = int((ours != reference[f"{camera}_{size}_at_{row}"]).any(-1).sum())
            if different:
                differences.append(f"{different} pixels of {camera} at {size} px, step {row}")
    return differences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", default=list(SUITES), metavar="SUITE")
    parser.add_argument("--tasks", nargs="+", type=int, metavar="ID", help="default: two telling ones of each suite")
    parser.add_argument("--all", action="store_true", help="every task of the suites")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, metavar="PIXELS")
    arguments = parser.parse_args()
    done = load_comparisons()
    waiting = []
    for suite in arguments.suites:
        ids = range(len(suite_tasks(suite))) if arguments.all else arguments.tasks or telling_tasks(suite)
        waiting += [task(suite, index) for index in ids if arguments.tasks or (suite, index) not in done]
    progress = Progress("exactness", len(waiting), "task")
    for index, scene in enumerate(waiting):
        result = compare(scene, scene.task_id + 1, scene.max_episode_steps, tuple(arguments.sizes))
        done[(scene.suite, scene.task_id)] = result
        ordered = [asdict(done[key]) for key in sorted(done, key=lambda key: (SUITES.index(key[0]), key[1]))]
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        replace_text(RESULTS, json.dumps(ordered, indent=1) + "\n")
        verdict = "; ".join(result.differences[:3]) or "identical"
        progress.update(index + 1, f"{scene.suite} {scene.task_id}: {verdict}", always=True)
    sys.exit(any(result.differences for result in done.values()))


def load_comparisons() -> dict[tuple[str, int], Comparison]:
    """What has been compared so far, by suite and task."""
    if not RESULTS.exists():
        return {}
    entries: list[dict[str, Any]] = json.loads(RESULTS.read_text())
    for entry in entries:
        entry.update(sizes=tuple(entry.get("sizes", ())), differences=tuple(entry["differences"]))
    return {(entry["suite"], entry["task_id"]): Comparison(**entry) for entry in entries}


if __name__ == "__main__":
    main()
