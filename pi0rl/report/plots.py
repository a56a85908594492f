"""Charts as SVG: equal bytes for equal data, and in the page's own colours where they are part of it."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
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
INK, MUTED, GRID, START, TRAINED, THIRD = "#22272e", "#67707c", "#e3e5e8", "#a35f14", "#0f7b6c", "#5b5bd6"
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", START: "start", TRAINED: "trained", THIRD: "third"}
POLICY_COLOURS = {"sft": START, "ppo": TRAINED, "grpo": THIRD}
_STYLE: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",
    "savefig.facecolor": "none",
    "axes.facecolor": "none",
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
ON_WHITE: dict[RcKeyType, Any] = {**_STYLE, "savefig.facecolor": "white"}
_SIZE = (3.6, 2.4)  # inches

# The metrics of one run, imitation and training.
Tables = tuple[pd.DataFrame, ...]


@dataclass(frozen=True)
class Panel:
    """One curve.

    Attributes:
        metric: the column that is drawn.
        title: what it is.
        step: the column it is drawn over.
        window: rows of the moving average.
        share: whether it is a share, to be shown from 0 to 100 %.
        log: whether its axis is logarithmic.
    """

    metric: str
    title: str
    step: str = "iteration"
    window: int = 5
    share: bool = False
    log: bool = False

    @property
    def colour(self) -> str:
        return TRAINED if self.step == "iteration" else START


PANELS: tuple[Panel, ...] = (
    Panel("sft/loss", "Imitation loss", step="step", window=25, log=True),
    Panel("sft/success_once", "Success during imitation", step="step", window=1, share=True),
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


def learning_charts(runs: Sequence[Tables]) -> tuple[Chart, ...]:
    """One chart per panel of which a table of a run holds at least one value.

    Several runs are several seeds: the chart shows their mean, each of them, and the band between the extremes.
    """
    charts = []
    for panel, curves in _curves(runs):
        with mpl.rc_context(_STYLE):
            figure = Figure(figsize=_SIZE, layout="constrained")
            _draw(figure.subplots(), curves, panel)
            charts.append(Chart(to_svg(figure, panel.metric), _describe(curves, panel)))
    return tuple(charts)


def learning_overview(runs: Sequence[Tables]) -> Chart | None:
    """All these panels in one picture; None without any."""
    curves = _curves(runs)
    if not curves:
        return None
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    with mpl.rc_context(ON_WHITE):
        figure = Figure(figsize=(_SIZE[0] * columns, _SIZE[1] * rows), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axis, (panel, of_panel) in zip(axes, curves, strict=False):
            _draw(axis, of_panel, panel)
        for axis in axes[len(curves) :]:
            axis.set_axis_off()
        return Chart(to_svg(figure, "overview"), " ".join(_describe(of_panel, panel) for panel, of_panel in curves))


def task_chart(tasks: tuple[TaskResult, ...], policies: tuple[str, ...]) -> Chart:
    """Success of every policy on every task, one line per task."""
    with mpl.rc_context({**ON_WHITE, "axes.grid.axis": "x"}):
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
        return Chart(to_svg(figure, "tasks"), "Success rate of every policy on every task.")


def inline(chart: Chart) -> str:
    """The chart as an element of a page: the page's colours and font, scaled to its container, read out by its text."""
    text = chart.svg[chart.svg.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font(-family)?: ([\d.]+px )?'DejaVu Sans'[^;\"]*", lambda m: f"font-size: {m[2] or ''}", text)
    text = text.replace("fill: #ffffff", "fill: none")  # the paper that a chart in a file of its own is drawn on
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    # Matplotlib names every group; names that nothing refers to would appear several times in one page.
    used = set(re.findall(r"#([\w-]+)", text))
    text = re.sub(r' id="([\w.-]+)"', lambda m: m[0] if m[1] in used else "", text)
    label = chart.description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return re.sub(r'<svg [^>]*?(viewBox="[^"]+")[^>]*>', rf'<svg \1 role="img" aria-label="{label}">', text, count=1)


def _curves(runs: Sequence[Tables]) -> list[tuple[Panel, list[pd.Series]]]:
    """Every panel that can be drawn, with one curve per run: values by step."""
    drawn = []
    for panel in PANELS:
        tables = [t for tables in runs for t in tables if {panel.step, panel.metric} <= set(t.columns)]
        rows = [table.loc[:, [panel.step, panel.metric]].dropna() for table in tables]
        curves = [pd.Series(r[panel.metric].to_numpy(), index=r[panel.step].to_numpy()) for r in rows if len(r)]
        if curves:
            drawn.append((panel, curves))
    return drawn


def _draw(axis: Axes, curves: list[pd.Series], panel: Panel) -> None:
    smooth = [pd.Series(curve.rolling(panel.window, min_periods=1, center=True).mean()) for curve in curves]
    if len(curves) == 1:
        axis.plot(curves[0].index, curves[0], color=panel.colour, alpha=0.3, linewidth=1.0)
    else:
        # Imitation may stop at another step under every seed: the spread is that of the seeds that got there.
        spread = pd.concat(smooth, axis=1).sort_index()
        axis.fill_between(spread.index, spread.min(axis=1), spread.max(axis=1), color=panel.colour, alpha=0.16, lw=0)
        for curve in smooth:
            axis.plot(curve.index, curve, color=panel.colour, alpha=0.35, linewidth=0.8)
        smooth = [pd.Series(spread.mean(axis=1))]
    marker = "o" if len(curves[0]) < 10 else ""
    axis.plot(smooth[0].index, smooth[0], color=panel.colour, linewidth=1.9, marker=marker, markersize=4)
    axis.set(title=panel.title, xlabel=panel.step)
    axis.tick_params(length=0, which="both")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    if panel.share:
        axis.set_ylim(0, 1)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    if panel.log:
        axis.set_yscale("log")
    else:
        axis.yaxis.set_major_locator(MaxNLocator(nbins=5))


def _describe(curves: list[pd.Series], panel: Panel) -> str:
    steps = [curves[0].index[position] for position in (0, -1)]
    ends = [[curve.iloc[position] for curve in curves] for position in (0, -1)]
    first, last = (
        f"{values[0]:.3g}" if len(values) == 1 else f"{min(values):.3g} to {max(values):.3g}" for values in ends
    )
    seeds = f" ({len(curves)} seeds)" if len(curves) > 1 else ""
    return f"{panel.title}{seeds}: {first} at {panel.step} {steps[0]}, {last} at {panel.step} {steps[1]}."


def to_svg(figure: Figure, name: str) -> str:
    buffer = io.StringIO()
    # The salt and the missing date make equal figures equal bytes; a salt per chart keeps ids apart in one page.
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
