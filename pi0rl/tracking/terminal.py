"""What a training shows while it runs: a small panel in a terminal, one plain line per iteration in a log."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

from pi0rl.progress import clock
from pi0rl.tracking.alarms import Alarm
from pi0rl.tracking.loggers import Table

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 40


class TrainingView:
    """Shows iterations as they end; alarms stay on the screen, above the panel."""

    def __init__(self, iterations: int, stream: TextIO | None = None) -> None:
        self._iterations, self._stream = iterations, stream or sys.stderr
        self._drawn = 0  # lines of the panel on the screen

    def show(self, metrics: Table, timing: Table, alarms: Sequence[Alarm]) -> None:
        """Show the last iteration of the tables, which hold at least one row."""
        lines = [str(alarm) for alarm in alarms]
        if self._stream.isatty():
            panel = panel_lines(self._iterations, metrics, timing)
            up = f"\x1b[{self._drawn}F\x1b[J" if self._drawn else ""
            lines, self._drawn = [up + line if number == 0 else line for number, line in enumerate([*lines, *panel])], 5
        else:
            lines.append(plain_line(self._iterations, metrics, timing))
        print("\n".join(lines), file=self._stream, flush=True)


def plain_line(iterations: int, metrics: Table, timing: Table) -> str:
    """The last iteration as one line."""
    number = max(metrics)
    row, seconds = metrics[number], timing[number]
    learned = [
        f"KL {row.get('actor/approx_kl', 0.0):.3f}",
        f"explained variance {row.get('critic/explained_variance', 0.0):.2f}",
    ]
    if row.get("rollout/samples") == 0.0:
        learned = ["all groups filtered, nothing to learn from"]
    parts = [
        f"success {row.get('env/success_once', 0.0):.2f}",
        f"length {row.get('env/episode_len', 0.0):.0f}",
        *learned,
        f"{seconds.get('perf/env_steps_per_second', 0.0):.0f} env steps/s",
        f"env workers {utilisation(seconds):.0%} busy",
    ]
    return f"{_progress(iterations, timing)}; {', '.join(parts)}"


def panel_lines(iterations: int, metrics: Table, timing: Table) -> list[str]:
    """The run so far as five lines."""
    number = max(metrics)
    row, seconds = metrics[number], timing[number]
    filled = _WIDTH * (number + 1) // iterations
    steps = sum(values.get("env/steps", 0.0) for values in metrics.values())
    return [
        f"{_progress(iterations, timing)}  {'█' * filled}{'░' * (_WIDTH - filled)}",
        f"  success   {row.get('env/success_once', 0.0):6.1%}  {sparkline(_column(metrics, 'env/success_once'), 0, 1)}",
        f"  KL        {row.get('actor/approx_kl', 0.0):6.3f}  {sparkline(_column(metrics, 'actor/approx_kl'))}",
        f"  steps/s   {seconds.get('perf/env_steps_per_second', 0.0):6.0f}  {steps:,.0f} env steps so far",
        f"  busy      {utilisation(seconds):6.0%}  of the rollouts' time, mean of the env workers",
    ]


def sparkline(values: Sequence[float], low: float | None = None, high: float | None = None) -> str:
    """The last values as bars between ``low`` and ``high`` (by default their own)."""
    shown = list(values)[-_WIDTH:]
    if not shown:
        return ""
    bottom, top = min(shown) if low is None else low, max(shown) if high is None else high
    scale = (len(_BARS) - 1) / (top - bottom) if top > bottom else 0.0
    return "".join(_BARS[min(max(round((value - bottom) * scale), 0), len(_BARS) - 1)] for value in shown)


def utilisation(seconds: dict[str, float]) -> float:
    """Share of the rollouts' time that env workers spent simulating, rendering and resetting."""
    if "perf/env_utilization" in seconds:
        return seconds["perf/env_utilization"]
    busy = sum(value for name, value in seconds.items() if name.startswith("time/env/"))
    rollouts = seconds.get("time/generate_rollouts", 0.0)
    return busy / rollouts if rollouts else 0.0


def _progress(iterations: int, timing: Table) -> str:
    """``train: iteration 3/28, 2:10, 18:03 left``; the times are those of the iterations, over all resumes."""
    done = max(timing) + 1
    durations = _column(timing, "time/step")
    left = f", {clock(sum(durations) / len(durations) * (iterations - done))} left" if durations else ""
    return f"train: iteration {done}/{iterations}, {clock(sum(durations))}{left if done < iterations else ''}"


def _column(table: Table, name: str) -> list[float]:
    return [table[step][name] for step in sorted(table) if name in table[step]]
