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
_ON_WHITE: dict[RcKeyType, Any] = {**_STYLE, "savefig.facecolor": "white"}
_SIZE = (3.6, 2.4)  # inches


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


def learning_charts(*tables: pd.DataFrame) -> tuple[Chart, ...]:
    """One chart per panel of which a table holds at least one value."""
    charts = []
    for panel, curve in _curves(tables):
        with mpl.rc_context(_STYLE):
            figure = Figure(figsize=_SIZE, layout="constrained")
            _draw_curve(figure.subplots(), curve, panel)
            charts.append(Chart(_svg(figure, panel.metric), _describe(curve, panel)))
    return tuple(charts)


def learning_overview(*tables: pd.DataFrame) -> Chart | None:
    """All these panels in one picture; None without any."""
    curves = _curves(tables)
    if not curves:
        return None
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    with mpl.rc_context(_ON_WHITE):
        figure = Figure(figsize=(_SIZE[0] * columns, _SIZE[1] * rows), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axis, (panel, curve) in zip(axes, curves, strict=False):
            _draw_curve(axis, curve, panel)
        for axis in axes[len(curves) :]:
            axis.set_axis_off()
        return Chart(_svg(figure, "overview"), " ".join(_describe(curve, panel) for panel, curve in curves))


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


def _curves(tables: tuple[pd.DataFrame, ...]) -> list[tuple[Panel, pd.DataFrame]]:
    """Every panel that can be drawn, with its two columns and the rows that hold a value."""
    curves = []
    for panel in PANELS:
        for table in tables:
            if {panel.step, panel.metric} <= set(table.columns):
                curve = table.loc[:, [panel.step, panel.metric]].dropna()
                if len(curve):
                    curves.append((panel, curve))
    return curves


def _draw_curve(axis: Axes, curve: pd.DataFrame, panel: Panel) -> None:
    steps, values = curve[panel.step], curve[panel.metric]
    smooth = values.rolling(panel.window, min_periods=1, center=True).mean()
    axis.plot(steps, values, color=panel.colour, alpha=0.3, linewidth=1.0)
    axis.plot(steps, smooth, color=panel.colour, linewidth=1.9, marker="o" if len(curve) < 10 else "", markersize=4)
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


def _describe(curve: pd.DataFrame, panel: Panel) -> str:
    steps, values = curve[panel.step].to_numpy(), curve[panel.metric].to_numpy()
    return f"{panel.title}: {values[0]:.3g} at {panel.step} {steps[0]}, {values[-1]:.3g} at {panel.step} {steps[-1]}."


def _svg(figure: Figure, name: str) -> str:
    buffer = io.StringIO()
    # The salt and the missing date make equal figures equal bytes; a salt per chart keeps ids apart in one page.
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
