"""Charts as SVG: equal bytes for equal data, and in the page's own colours where they are part of it."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from matplotlib.typing import RcKeyType

from pi0rl.report.tables import POLICY_LABELS, TaskResult

# Each colour stands for a variable of the page's style sheet; `inline` swaps them, so charts follow light and dark.
INK, MUTED, GRID, START, TRAINED, THIRD = "#22272e", "#67707c", "#e3e5e8", "#b86e1c", "#0f7b6c", "#5b5bd6"
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", START: "start", TRAINED: "trained", THIRD: "third"}
POLICY_COLOURS = {"sft": START, "ppo": TRAINED, "grpo": THIRD}
_STYLE: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
}
_ON_WHITE: dict[RcKeyType, Any] = {**_STYLE, "savefig.facecolor": "white"}
_SMOOTHING = 5  # iterations


@dataclass(frozen=True)
class Panel:
    """One curve over training: the metric's name, its title, whether it is a share to be shown in percent."""

    metric: str
    title: str
    share: bool = False


PANELS: tuple[Panel, ...] = (
    Panel("env/success_once", "Success of training episodes", share=True),
    Panel("env/episode_len", "Episode length (steps)"),
    Panel("actor/approx_kl", "Approximate KL per update"),
    Panel("critic/explained_variance", "Explained variance of the critic"),
)


@dataclass(frozen=True)
class Chart:
    """A drawn chart: its SVG text, and in words what it shows."""

    svg: str
    description: str


def learning_charts(metrics: pd.DataFrame) -> tuple[Chart, ...]:
    """One chart per panel of which the metrics hold at least one finite value."""
    charts = []
    for panel in _present(metrics):
        with mpl.rc_context(_STYLE):
            figure = Figure(figsize=(4.6, 2.7), layout="constrained")
            _draw_curve(figure.subplots(), metrics, panel)
            charts.append(Chart(_svg(figure, panel.metric), _describe(metrics, panel)))
    return tuple(charts)


def learning_overview(metrics: pd.DataFrame) -> Chart | None:
    """All panels in one picture; None without any."""
    panels = _present(metrics)
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with mpl.rc_context(_ON_WHITE):
        figure = Figure(figsize=(4.6 * columns, 2.7 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flat
        for axis, panel in zip(axes, panels, strict=False):
            _draw_curve(axis, metrics, panel)
        for axis in list(axes)[len(panels) :]:
            axis.set_axis_off()
        return Chart(_svg(figure, "overview"), " ".join(_describe(metrics, panel) for panel in panels))


def imitation_chart(metrics: pd.DataFrame) -> Chart | None:
    """The loss of imitation over its steps; None if it was not recorded."""
    if not {"step", "sft/loss"} <= set(metrics.columns):
        return None
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axis: Axes = figure.subplots()
        axis.plot(metrics["step"], metrics["sft/loss"], color=START, linewidth=1.6)
        axis.set(title="Imitation loss", xlabel="gradient step", yscale="log")
        first, last = metrics["sft/loss"].iloc[0], metrics["sft/loss"].iloc[-1]
        text = (
            f"Imitation loss: {first:.3g} at step {metrics['step'].iloc[0]}, {last:.3g} at {metrics['step'].iloc[-1]}."
        )
        return Chart(_svg(figure, "imitation"), text)


def task_chart(tasks: tuple[TaskResult, ...], policies: tuple[str, ...]) -> Chart:
    """Success of every policy on every task, one line per task."""
    with mpl.rc_context({**_ON_WHITE, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(7.6, 0.9 + 0.33 * len(tasks)), layout="constrained")
        axis: Axes = figure.subplots()
        rows = np.arange(len(tasks))
        rates = np.array([[task.rate(policy) for policy in policies] for task in tasks])
        axis.hlines(rows, rates.min(axis=1), rates.max(axis=1), color=GRID, linewidth=4, zorder=1)
        for column, policy in enumerate(policies):
            label, colour = POLICY_LABELS.get(policy, policy), POLICY_COLOURS.get(policy, MUTED)
            axis.scatter(rates[:, column], rows, s=48, color=colour, label=label, zorder=2)
        axis.set_yticks(rows, [task.language for task in tasks])
        axis.tick_params(length=0)
        axis.set(xlim=(-0.03, 1.03), ylim=(len(tasks) - 0.4, -0.6))
        axis.xaxis.set_major_formatter(PercentFormatter(1.0))
        axis.spines["left"].set_visible(False)
        figure.legend(loc="outside upper right", ncols=len(policies))
        return Chart(_svg(figure, "tasks"), "Success rate of every policy on every task.")


def inline(chart: Chart) -> str:
    """The chart as an element of a page: the page's colours and font, scaled to its container, read out by its text."""
    text = chart.svg[chart.svg.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font(-family)?: ([\d.]+px )?'DejaVu Sans'[^;\"]*", lambda m: f"font-size: {m[2] or ''}", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    # Matplotlib names every group; names that nothing refers to would appear several times in one page.
    used = set(re.findall(r"#([\w-]+)", text))
    text = re.sub(r' id="([\w.-]+)"', lambda m: m[0] if m[1] in used else "", text)
    label = chart.description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return re.sub(r'<svg [^>]*?(viewBox="[^"]+")[^>]*>', rf'<svg \1 role="img" aria-label="{label}">', text, count=1)


def _present(metrics: pd.DataFrame) -> list[Panel]:
    return [
        panel
        for panel in PANELS
        if panel.metric in metrics and np.isfinite(metrics[panel.metric].to_numpy(float)).any()
    ]


def _draw_curve(axis: Axes, metrics: pd.DataFrame, panel: Panel) -> None:
    iterations, values = metrics["iteration"], metrics[panel.metric]
    smooth = values.rolling(_SMOOTHING, min_periods=1, center=True).mean()
    axis.plot(iterations, values, color=TRAINED, alpha=0.3, linewidth=1.0)
    axis.plot(iterations, smooth, color=TRAINED, linewidth=1.9)
    axis.set(title=panel.title, xlabel="iteration")
    axis.tick_params(length=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axis.yaxis.set_major_locator(MaxNLocator(nbins=5))
    if panel.share:
        axis.set_ylim(0, 1)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))


def _describe(metrics: pd.DataFrame, panel: Panel) -> str:
    known = metrics[["iteration", panel.metric]].dropna()
    (start, first), (end, last) = known.iloc[0], known.iloc[-1]
    return f"{panel.title}: {first:.3g} at iteration {start:.0f}, {last:.3g} at iteration {end:.0f}."


def _svg(figure: Figure, name: str) -> str:
    buffer = io.StringIO()
    # The salt and the missing date make equal figures equal bytes; a salt per chart keeps ids apart in one page.
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
