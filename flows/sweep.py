"""The Prefect flow of a sweep: shared stages once, then the points side by side, then a comparison.

DVC decides what is stale in every point as in a single experiment, so a sweep that is started again runs only what is
missing, and a point that failed does not stop the others.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import wait
from prefect.task_runners import ThreadPoolTaskRunner

from flows.artifacts import show_comparison
from flows.points import Outcome, run_experiments
from flows.program import exit_code
from flows.room import Gpus, gpus_of, points_that_fit, this_machine
from flows.search import run_search
from pi0rl.errors import UserError
from pi0rl.experiment import Experiment, open_experiment
from pi0rl.processes import stop_descendants
from pi0rl.report.sweep import Finished, write_sweep_report
from pi0rl.sweeps import Sweep, experiments, grid_points, load_sweep, sweep_dir, sweep_report_dir
from pi0rl.tracking.sweep import begin_sweep, finish_sweep


@flow(  # pyright: ignore[reportCallIssue]
    name="libero-sweep",
    flow_run_name="{sweep}",
    persist_result=False,
    validate_parameters=False,
    # what runs at a time is decided below, by what the machine has
    task_runner=ThreadPoolTaskRunner(max_workers=64),  # pyright: ignore[reportArgumentType]
)
def libero_sweep(sweep: str = "quickstart", overrides: Sequence[str] = (), concurrency: int | None = None) -> str:
    """Run every point of ``params/sweeps/<sweep>.yaml`` that is not done; returns the folder of the comparison.

    Args:
        sweep: its name.
        overrides: ``key=value`` strings laid over every point, for instance ``runner.max_epochs=4``.
        concurrency: points at a time, in place of what the file says.

    Raises:
        UserError: bad params (before anything starts), or points that failed (after the others have ended).
    """
    plan = load_sweep(sweep, overrides)
    base = open_experiment(plan.experiment)  # says where to log
    begin_sweep(sweep, sweep_dir(sweep), base)
    outcomes = _run_grid(sweep, plan, concurrency) if plan.search is None else run_search(sweep, plan)
    finished = [
        Finished(each.point.name, each.point.coordinates, each.experiment.report_dir)
        for each in outcomes
        if not each.error
    ]
    failed = [each for each in outcomes if each.error]
    report = write_sweep_report(sweep, finished, sweep_report_dir(sweep)) if finished else None
    finish_sweep(sweep_dir(sweep), base, report, failed=len(failed))
    if report is not None:
        show_comparison(sweep, report)
    if failed:
        reasons = "; ".join(f"{each.point.name}: {each.error}" for each in failed)
        raise UserError(
            f"sweep {sweep}: {len(failed)} of {len(outcomes)} points failed ({reasons}); "
            "the same command runs only these again"
        )
    return str(report)


def _run_grid(name: str, plan: Sweep, concurrency: int | None) -> list[Outcome]:
    points = grid_points(plan)
    chains = [experiments(name, plan, point) for point in points]  # a mistake shows before anything starts
    machine = this_machine()
    needed = [gpus_of(chain[-1], machine) for chain in chains]
    gpus = Gpus(machine.gpus)
    at_a_time = concurrency or plan.concurrency or points_that_fit([chain[-1] for chain in chains], machine)
    print(f"sweep {name}: {len(points)} points, {at_a_time} at a time", flush=True)
    room, stopping = threading.Semaphore(at_a_time), threading.Event()
    locks = {part.reference: threading.Lock() for chain in chains for part in chain}
    done: set[str] = set()

    @task(cache_policy=NO_CACHE, task_run_name="{point}", persist_result=False)
    def run_point(point: str, chain: tuple[Experiment, ...], needs_gpus: int) -> None:
        """Its shared stages, if no other point has run them yet, and its own."""
        with room, gpus.take(needs_gpus) as variables:
            for part in chain:
                if stopping.is_set():
                    raise UserError("the sweep was stopped")
                with locks[part.reference]:
                    # once: DVC refuses to look at a shared stage again while another point reads what it made
                    if part.reference not in done:
                        run_experiments(f"{point} ", part, variables=variables)
                        done.add(part.reference)

    futures = [
        run_point.submit(point.name, chain, needs) for point, chain, needs in zip(points, chains, needed, strict=True)
    ]
    try:
        wait(futures)
    except BaseException:
        stopping.set()
        stop_descendants()  # the threads below wait for their stages
        raise
    return [
        Outcome(point, chain[-1], _reason(future.state))
        for point, chain, future in zip(points, chains, futures, strict=True)
    ]


def _reason(state: State[None]) -> str:
    if state.is_completed():
        return ""
    error = state.result(raise_on_failure=False)
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def main(arguments: list[str]) -> int:
    """``python -m flows.sweep NAME [KEY=VALUE ...]``: the flow, its errors as one line."""
    name, *overrides = arguments
    return exit_code(lambda: print(f"comparison: {libero_sweep(name, overrides)}"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
