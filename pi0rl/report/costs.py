"""What a run took: episodes, steps, hours, energy."""

from __future__ import annotations

import os
from dataclasses import dataclass
from fnmatch import fnmatchcase

import pandas as pd

from pi0rl.report.inputs import Run

# Rough shares of a machine's power while it computes (W): a server core with its memory, a data-centre GPU.
WATTS_PER_CORE, WATTS_PER_GPU = 10.0, 600.0


@dataclass(frozen=True)
class Cost:
    """One line of what a run took: what, how much."""

    name: str
    value: str


def effort(run: Run) -> tuple[Cost, ...]:
    """What was simulated and learned, in counts that are equal for equal runs."""
    costs = []
    if len(run.metrics):
        costs.append(Cost("Training iterations", f"{len(run.metrics):,}"))
    for metric, name in (("env/num_trajectories", "Training episodes"), ("env/steps", "Training environment steps")):
        if metric in run.metrics:
            costs.append(Cost(name, f"{int(run.metrics[metric].to_numpy().sum()):,}"))
    costs.append(Cost("Evaluation episodes", f"{len(run.episodes):,}"))
    costs.append(Cost("Evaluation environment steps", f"{int(run.episodes['steps'].to_numpy().sum()):,}"))
    return tuple(costs)


def throughput(run: Run) -> tuple[Cost, ...]:
    """Rates over whole stages, start-up included, and the energy they may have taken.

    The cores are this machine's. The GPUs are those that training saw, at the power they drew then on average, or at
    WATTS_PER_GPU where the driver did not tell.
    """
    seconds = {stage.stage: stage.seconds for stage in run.stages}
    costs = []
    if "env/steps" in run.metrics and seconds.get("train"):
        rate = run.metrics["env/steps"].to_numpy().sum() / seconds["train"]
        costs.append(Cost("Training, environment steps per second", f"{rate:,.0f}"))
    if seconds.get("evaluate"):
        costs.append(Cost("Evaluation, episodes per minute", f"{60 * len(run.episodes) / seconds['evaluate']:,.1f}"))
    if seconds:
        cores = os.cpu_count() or 1
        hours = sum(seconds.values()) / 3600
        gpus = len(_gpu_columns(run.timing, "utilization_percentage"))
        machine = f"{cores} cores" + (f" and {gpus} GPU{'s' if gpus > 1 else ''}" if gpus else "")
        costs.append(Cost("Machine hours", f"{hours:,.2f} on {machine}"))
        drawn = _gpu_columns(run.timing, "power_usage_watts")
        assumption, watts = f"{WATTS_PER_CORE:.0f} W per core", cores * WATTS_PER_CORE
        if gpus:
            per_gpu = float(run.timing[drawn].to_numpy().mean()) if drawn else WATTS_PER_GPU
            assumption += f", {per_gpu:.0f} W per GPU" + (" as measured in training" if drawn else "")
            watts += gpus * per_gpu
        costs.append(Cost(f"Energy, roughly ({assumption})", f"{hours * watts / 1000:,.2g} kWh"))
    return tuple(costs)


def _gpu_columns(timing: pd.DataFrame, what: str) -> list[str]:
    return [str(column) for column in timing if fnmatchcase(str(column), f"system/gpu_*_{what}")]


def training_time(timing: pd.DataFrame) -> tuple[Cost, ...]:
    """Where the wall time of training went: the sum of every ``time/*``, the mean of every ``perf/*``."""
    times = {
        str(c).removeprefix("time/"): float(timing[c].to_numpy().sum()) for c in timing if str(c).startswith("time/")
    }
    rates = {
        str(c).removeprefix("perf/"): float(timing[c].dropna().to_numpy().mean())
        for c in timing
        if str(c).startswith("perf/")
    }
    return (
        *(Cost(_spoken(name), duration(seconds)) for name, seconds in times.items()),
        *(Cost(_spoken(name), f"{rate:,.3g} on average") for name, rate in rates.items() if name != "alarms"),
    )


def duration(seconds: float) -> str:
    """75.2 -> '1 min 15 s'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _spoken(name: str) -> str:
    """'env/simulate_steps' -> 'env: simulate steps'."""
    return name.replace("/", ": ").replace("_", " ")
