"""What a run took: episodes, steps, hours, energy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import pandas as pd

from pi0rl.machine import Machine
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
    """Rates over whole stages, start-up and interruptions included, and the energy they may have taken.

    Cores and GPUs are those of the machines that the stages recorded; the GPUs at the power that they drew in training
    on average, or at WATTS_PER_GPU where the driver did not tell. Energy is left out where a machine is not known.
    """
    seconds = {stage.stage: stage.seconds for stage in run.stages}
    costs = []
    if "env/steps" in run.metrics and seconds.get("train"):
        rate = run.metrics["env/steps"].to_numpy().sum() / seconds["train"]
        costs.append(Cost("Training, environment steps per second", f"{rate:,.0f}"))
    if seconds.get("evaluate"):
        costs.append(Cost("Evaluation, episodes per minute", f"{60 * len(run.episodes) / seconds['evaluate']:,.1f}"))
    hours: dict[Machine | None, float] = {}
    for stage in run.stages:
        for invocation in stage.invocations:
            hours[invocation.machine] = hours.get(invocation.machine, 0.0) + invocation.seconds / 3600
    if hours:
        parts = [f"{each:,.2f} on {machine or 'a machine that is not recorded'}" for machine, each in hours.items()]
        costs.append(Cost("Machine hours", ", ".join(parts)))
    known = {machine: each for machine, each in hours.items() if machine is not None}
    return (*costs, _energy(run, known)) if known and len(known) == len(hours) else tuple(costs)


def _energy(run: Run, hours: Mapping[Machine, float]) -> Cost:
    drawn = [column for column in run.timing if fnmatchcase(str(column), "system/gpu_*_power_usage_watts")]
    per_gpu = float(run.timing[drawn].to_numpy().mean()) if drawn else WATTS_PER_GPU
    assumption = f"{WATTS_PER_CORE:.0f} W per core"
    if any(machine.gpus for machine in hours):
        assumption += f", {per_gpu:.0f} W per GPU" + (" as measured in training" if drawn else "")
    watt_hours = sum(
        each * (machine.cores * WATTS_PER_CORE + len(machine.gpus) * per_gpu) for machine, each in hours.items()
    )
    return Cost(f"Energy, roughly ({assumption})", f"{watt_hours / 1000:,.2g} kWh")


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
