"""Times rollouts through Ray: two pipeline stages against one, Ray against one process, and env workers on cores.

    python -m benchmarks.cluster           # a quarter of an hour on two idle cores
    python -m benchmarks.cluster --quick   # does it run? One round of a few episodes; nothing is written
    python -m benchmarks.cluster --model   # only the scaling model, from benchmarks/results

The policy is a random tiny pi0 at the quickstart's sizes; episodes are the quickstart's, played to the step limit.
Every round measures each way once, one after the other, so that a busy machine slows all of them alike; ratios are
taken within rounds. Results go to benchmarks/results/cluster.json and cluster.md, the scaling model with them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import psutil
import ray

from benchmarks.machine import describe_machine
from benchmarks.scaling import scaling_table
from pi0rl.cluster.placement import Placement
from pi0rl.cluster.players import Players, PlayersConfig, open_players
from pi0rl.cluster.reservation import Reservation
from pi0rl.cluster.rollout_worker import NoiseKey, PlayMode, RolloutWorker
from pi0rl.cluster.session import ray_session
from pi0rl.cluster.setup import players_config
from pi0rl.files import replace_text
from pi0rl.libero.plan import Episode, evaluation_plan
from pi0rl.libero.simulation import ACTION_DIM
from pi0rl.libero.slots import EpisodeResult, Look, Slots
from pi0rl.libero.suites import suite_tasks
from pi0rl.params import ClusterParams, load_params
from pi0rl.policy.checkpoints import save_policy
from pi0rl.policy.config import TINY
from pi0rl.policy.policy import create_policy
from pi0rl.policy.processing import mean_std, tiny_processing
from pi0rl.progress import Progress

RESULTS = Path(__file__).parent / "results"
PARAMS = Path(__file__).parents[1] / "params" / "quickstart.yaml"
SUITE = "libero_object"
CPU = Placement((), (), ())
NOISE = NoiseKey(seed=0, stream=0, iteration=0)


@dataclass(frozen=True)
class Row:
    """One measurement: control steps and seconds of a way in a round; shares of the time its components were busy."""

    way: str
    round: int
    steps: int
    seconds: float
    env_busy: float
    rollout_busy: float

    @property
    def rate(self) -> float:
        """Control steps per second."""
        return self.steps / self.seconds


Timing = tuple[int, float, float, float]
"""Control steps, seconds, and the shares of them in which env and rollout were busy."""
Way = Callable[[], Timing]


class StillPolicy:
    """A rollout worker that costs nothing: it stands still, to measure env workers alone."""

    def begin(self, noise: NoiseKey, mode: PlayMode, version: int) -> None:
        """Nothing to prepare."""

    def act(self, look: Look) -> np.ndarray:
        return np.zeros((len(look.episode), 8, ACTION_DIM))

    def acting_seconds(self) -> float:
        return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--episodes", type=int, default=32, help="of a round, all at once")
    parser.add_argument("--quick", action="store_true", help="one round of four episodes; nothing is written")
    parser.add_argument("--model", action="store_true", help="print the scaling model alone")
    options = parser.parse_args()
    if options.model:
        print(scaling_table(json.loads((RESULTS / "cluster.json").read_text())["rates"]["1 env worker"]))
        return
    rounds, episodes = (1, 4) if options.quick else (options.rounds, options.episodes)
    started = perf_counter()
    rows = measure(rounds, episodes)
    result = {
        "machine": describe_machine(),
        "episodes": episodes,
        "seconds": perf_counter() - started,
        "rows": [vars(row) for row in rows],
        **summary(rows),
    }
    if not options.quick:
        replace_text(RESULTS / "cluster.json", json.dumps(result, indent=1) + "\n")
        replace_text(RESULTS / "cluster.md", report(result))
    print(report(result))


def measure(rounds: int, episodes: int) -> list[Row]:
    """All ways in all rounds; every way has processes of its own, which stand still while others are measured."""
    tasks = len(suite_tasks(SUITE))
    plan = evaluation_plan([SUITE], "official", -(-episodes // tasks), seed=0)[:episodes]
    params = load_params(PARAMS)
    base = replace(players_config(params, params.env.train), slots=episodes)
    rows: list[Row] = []
    with ExitStack() as stack:
        checkpoint = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "policy"
        save_random_policy(checkpoint)
        stack.enter_context(ray_session(ClusterParams(), cpus=5))

        def through_ray(workers: int, stages: int, policy: Path | None) -> Way:
            config = replace(base, workers=workers, stages=stages)
            opened = still_players(config) if policy is None else open_players(config, CPU, policy)
            return partial(timed, stack.enter_context(opened), plan)

        ways = {
            "one process": in_one_process(base, checkpoint, plan),
            "Ray, 1 stage": through_ray(1, 1, checkpoint),
            "Ray, 2 stages": through_ray(1, 2, checkpoint),
            "1 env worker": through_ray(1, 2, None),
            "2 env workers": through_ray(2, 2, None),
        }
        progress = Progress("cluster", len(ways) * (rounds + 1), "measurement", 0)
        for number in range(-1, rounds):  # in the first one models are compiled and loaded: it is not kept
            for index, (way, play) in enumerate(ways.items()):
                row = Row(way, number, *play())
                rows += [row] if number >= 0 else []
                progress.update(len(ways) * (number + 1) + index + 1, f"{way}: {row.rate:.0f} steps/s")
    return rows


def in_one_process(config: PlayersConfig, checkpoint: Path, plan: Sequence[Episode]) -> Way:
    """The same simulations and the same policy without Ray, one after the other."""
    slots = Slots(config.slots, config.slot)
    worker = RolloutWorker(checkpoint, config.sampler, None, 1, "cpu")
    worker.start()

    def play() -> Timing:
        started = perf_counter()
        worker.begin(NOISE, "train")
        look = slots.start(plan)
        while look.running:
            look = slots.step(worker.act(look))
        worker.act(look)
        seconds = perf_counter() - started
        steps = sum(result.steps for result in slots.results)
        return steps, seconds, sum(slots.seconds.values()) / seconds, worker.seconds / seconds

    return play


@contextmanager
def still_players(config: PlayersConfig) -> Iterator[Players]:
    """Env workers without a policy to wait for."""
    policy: Any = ray.remote(StillPolicy).options(num_cpus=0).remote()
    with Reservation(CPU, config.workers, ("env",)) as room:
        yield Players(config, room, [policy])
    ray.kill(policy)


def timed(players: Players, plan: Sequence[Episode]) -> Timing:
    """``plan`` played once."""
    started = perf_counter()
    results: list[EpisodeResult] = players.play(plan, NOISE, "train")
    seconds = perf_counter() - started
    env = players.env_seconds()
    busy = sum(sum(worker.values()) for worker in env) / len(env) / seconds
    return sum(result.steps for result in results), seconds, busy, players.acting_seconds() / seconds


def save_random_policy(directory: Path) -> None:
    """A tiny pi0 that has learnt nothing, with the sizes of the quickstart's."""
    prompts = tuple(task.language for task in suite_tasks(SUITE))
    state, action = mean_std(np.zeros((2, 8))), mean_std(np.zeros((2, 7)))
    save_policy(create_policy(TINY, tiny_processing(TINY, state, action, prompts), seed=0), directory)


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Medians by way; of the ratios within rounds lowest, median and highest; medians of shares of the time."""
    of = {(row.way, row.round): row for row in rows}
    ways, rounds = dict.fromkeys(row.way for row in rows), sorted({row.round for row in rows})

    def spread(ratio: Callable[[int], float]) -> list[float]:
        ratios = [ratio(number) for number in rounds]
        return [min(ratios), median(ratios), max(ratios)]

    def rate(way: str, number: int) -> float:
        return of[way, number].rate

    def idle(way: str) -> float:
        """The share of the time in which neither env nor rollout worked, where they take turns."""
        return median(1.0 - of[way, number].env_busy - of[way, number].rollout_busy for number in rounds)

    def cost(way: str, number: int) -> float:
        """A worker's busy time per control step, up to a factor."""
        return of[way, number].env_busy / rate(way, number)

    return {
        "rates": {way: median(rate(way, number) for number in rounds) for way in ways},
        "gain_of_two_stages": spread(lambda n: rate("Ray, 2 stages", n) / rate("Ray, 1 stage", n) - 1.0),
        "time_through_ray": spread(lambda n: rate("one process", n) / rate("Ray, 1 stage", n) - 1.0),
        "idle_through_ray": idle("Ray, 1 stage"),
        "idle_in_one_process": idle("one process"),
        "scaling_to_two_workers": spread(lambda n: rate("2 env workers", n) / rate("1 env worker", n)),
        "step_beside_another": spread(lambda n: 2.0 * cost("2 env workers", n) / cost("1 env worker", n) - 1.0),
        "load_average": psutil.getloadavg()[0],
    }


def report(result: dict[str, Any]) -> str:
    """The numbers as Markdown."""
    rows = [Row(**row) for row in result["rows"]]
    lines = [
        "# Rollouts through Ray",
        "",
        f"`python -m benchmarks.cluster` on {result['machine']['cores']} cores of {result['machine']['processor']}: "
        f"{result['episodes']} episodes of {SUITE} at a time, {len({row.round for row in rows})} rounds, medians; "
        f"{result['seconds'] / 60:.0f} minutes in all; load average at the end {result['load_average']:.1f}.",
        "",
        "| way | control steps per second | env busy | rollout busy |",
        "|---|---|---|---|",
    ]
    for way, rate in result["rates"].items():
        env, rollout = (median(getattr(row, name) for row in rows if row.way == way) for name in _BUSY)
        lines.append(f"| {way} | {rate:.0f} | {env:.0%} | {rollout:.0%} |")
    lines += [
        "",
        "Ratios within rounds, lowest, median and highest:",
        "",
        f"- two stages instead of one: {_three(result['gain_of_two_stages'])}",
        f"- time through Ray instead of in one process (one stage, so nothing overlaps): "
        f"{_three(result['time_through_ray'])}. The pace of the machine between two measurements moves this more than "
        "Ray does. What Ray costs is the time in which neither env nor rollout works: "
        f"{result['idle_through_ray']:.2%} through Ray, {result['idle_in_one_process']:.2%} in one process.",
        "- two env workers instead of one, without a policy: x "
        + ", ".join(f"{ratio:.2f}" for ratio in result["scaling_to_two_workers"])
        + f". A control step itself takes longer while the other core simulates too: "
        f"{_three(result['step_beside_another'])}.",
        "",
        "## What an iteration costs on more GPUs",
        "",
        scaling_table(result["rates"]["1 env worker"]),
        "",
    ]
    return "\n".join(lines)


def _three(ratios: Sequence[float]) -> str:
    return ", ".join(f"{ratio:+.1%}" for ratio in ratios)


_BUSY = ("env_busy", "rollout_busy")


if __name__ == "__main__":
    main()
