"""Alarms: what a person who watches a training should be told at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal

from pi0rl.tracking.loggers import Table

Kind = Literal["not finite", "KL", "success drop", "slow worker", "slow iteration", "collapse"]

# Without algorithm.target_kl, an update that moves the policy this far (nats per chunk) is suspicious.
KL_LIMIT = 0.5
# Success over this many iterations may stay this far (absolute) behind the best such mean.
WINDOW, DROP = 5, 0.15
# The busiest env worker against the mean of all, and an iteration against the median of those before.
SLOW_WORKER, SLOW_ITERATION = 1.5, 2.5


@dataclass(frozen=True)
class Alarm:
    """What is wrong with an iteration, and in words."""

    iteration: int
    kind: Kind
    message: str

    def __str__(self) -> str:
        return f"ALARM ({self.kind}) at iteration {self.iteration}: {self.message}"


def alarms(
    iteration: int, latest: Mapping[str, float], metrics: Table, timing: Table, target_kl: float | None
) -> tuple[Alarm, ...]:
    """The alarms of ``iteration``.

    Args:
        iteration: the one that just ended; ``metrics`` and ``timing`` hold its row already.
        latest: its metrics as they came, before values that are not finite were dropped.
        metrics, timing: all rows so far.
        target_kl: KL at which an update stops itself, if it does; twice that is alarming.
    """
    found: list[tuple[Kind, str]] = []
    broken = sorted(
        name for name, value in latest.items() if not math.isfinite(value) and not name.startswith("critic/")
    )
    skipped = latest.get("actor/skipped_steps", 0.0)
    if broken:
        found.append(("not finite", f"{', '.join(broken)}"))
    if skipped > 0:
        found.append(("not finite", f"{skipped:.0f} optimiser steps left out, their gradients were not finite"))
    kl, limit = latest.get("actor/approx_kl_k2", 0.0), 2 * target_kl if target_kl else KL_LIMIT
    if kl > limit:
        found.append(("KL", f"the update moved the policy by {kl:.3f} nats, expected at most {limit:.3f}"))
    found += _success(metrics) + _slow(iteration, timing)
    return tuple(Alarm(iteration, kind, message) for kind, message in found)


def _success(metrics: Table) -> list[tuple[Kind, str]]:
    values = [metrics[step]["env/success_once"] for step in sorted(metrics) if "env/success_once" in metrics[step]]
    means = [fmean(values[end - WINDOW : end]) for end in range(WINDOW, len(values) + 1)]
    if not means or means[-1] >= max(means) - DROP:
        return []
    return [("success drop", f"{means[-1]:.0%} over the last {WINDOW} iterations, {max(means):.0%} at its best")]


def _slow(iteration: int, timing: Table) -> list[tuple[Kind, str]]:
    row, found = timing[iteration], []
    slowest = row.get("perf/env_slowest", 1.0)
    if slowest > SLOW_WORKER:
        found.append(("slow worker", f"one env worker was busy {slowest:.1f} times as long as the mean of all"))
    before = [values["time/step"] for step, values in timing.items() if step < iteration and "time/step" in values]
    if len(before) >= WINDOW and row.get("time/step", 0.0) > SLOW_ITERATION * median(before):
        found.append(("slow iteration", f"{row['time/step']:.0f} s, the median before is {median(before):.0f} s"))
    return found
