"""Charts of a sweep: what each axis does on average, and every point as a line through its values."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from pi0rl.report.plots import GRID, INK, MUTED, ON_WHITE, TRAINED, Chart, to_svg

# Lines through one value run side by side, the better the higher, within this share of the axis.
_SPREAD = 0.05


def main_effects(table: pd.DataFrame, axes: list[str]) -> Chart | None:
    """Success after training at every level of every axis: each point as a dot, the mean over the others as a line.

    Where points are missing, a level's mean is over other values of the other axes than its neighbour's, so each level
    says over how many points it is.
    """
    axes = _varied(table, axes)
    if not axes:
        return None
    with mpl.rc_context(ON_WHITE):
        figure = Figure(figsize=(max(9.6, 2.6 * len(axes)), 3.0), layout="constrained")
        panels = np.atleast_1d(figure.subplots(1, len(axes), sharey=True))
        words = []
        for panel, axis in zip(panels, axes, strict=True):
            labels = list(dict.fromkeys(table[axis].astype(str)))
            positions = table[axis].astype(str).map(labels.index)
            levels = [table.loc[positions == index, "after"] for index in range(len(labels))]
            means = [float(level.mean()) for level in levels]
            panel.scatter(positions, table["after"], s=22, color=MUTED, alpha=0.6)
            panel.plot(range(len(labels)), means, color=TRAINED, marker="o", linewidth=1.9)
            ticks = [f"{label}\n(n = {len(level)})" for label, level in zip(labels, levels, strict=True)]
            panel.set_xticks(range(len(labels)), ticks)
            panel.set(title=axis, xlim=(-0.4, len(labels) - 0.6), ylim=(0, 1))
            panel.yaxis.set_major_formatter(PercentFormatter(1.0))
            told = zip(labels, means, levels, strict=True)
            in_words = (f"{label} {100 * mean:.0f} % (n = {len(level)})" for label, mean, level in told)
            words.append(f"{axis}: {', '.join(in_words)}")
        return Chart(to_svg(figure, "effects"), f"Mean success after training by axis. {'; '.join(words)}.")


def parallel_coordinates(table: pd.DataFrame, axes: list[str]) -> Chart | None:
    """Every point as a line through its value on each axis to its success, the better the stronger."""
    axes = _varied(table, [*axes, "seed"])
    if len(axes) < 2:
        return None
    with mpl.rc_context(ON_WHITE):
        figure = Figure(figsize=(9.6, 3.4), layout="constrained")
        panel = figure.subplots()
        places = [_heights(table[axis].tolist()) for axis in axes]
        success = table["after"].to_numpy(float)
        strength = _heights(np.argsort(np.argsort(success, kind="stable")).tolist())
        heights = [place + _SPREAD * (strength - 0.5) for place in places]
        panel.vlines(range(len(axes) + 1), 0, 1, color=GRID)
        for line, strong in zip(np.column_stack([*heights, success]), strength, strict=True):
            panel.plot(range(len(line)), line, color=TRAINED, alpha=0.12 + 0.88 * float(strong) ** 2, linewidth=1.5)
        for column, axis in enumerate(axes):
            for value, height in dict(zip(table[axis].astype(str), places[column], strict=True)).items():
                _label(panel, value, column, float(height))
        for rate in (0.0, 1.0):
            _label(panel, f"{rate:.0%}", len(axes), rate)
        panel.set_xticks(range(len(axes) + 1), [*axes, "success"])
        panel.set(ylim=(-0.18, 1.18), yticks=[])
        panel.spines[["left", "bottom"]].set_visible(False)
        panel.tick_params(length=0)
        return Chart(to_svg(figure, "parallel"), "Every point as a line through its values to its success.")


def _label(panel: Axes, text: str, column: int, height: float) -> None:
    """A value beside its place on an axis, above it or below it, where fewer lines pass."""
    above = height > 0.5
    panel.annotate(
        text,
        (column, height),
        fontsize=8,
        color=INK,
        ha="center",
        va="bottom" if above else "top",
        xytext=(0, 8 if above else -8),
        textcoords="offset points",
    )


def _varied(table: pd.DataFrame, axes: list[str]) -> list[str]:
    """Those of ``axes`` with more than one value."""
    return [axis for axis in axes if axis in table and len(set(table[axis].astype(str))) > 1]


def _heights(values: list[Any]) -> np.ndarray:
    """Where values lie between 0 and 1: numbers by size, names in the order they appear."""
    if all(isinstance(value, int | float) for value in values):
        numbers = np.asarray(values, float)
    else:
        names = list(dict.fromkeys(map(str, values)))
        numbers = np.asarray([names.index(str(value)) for value in values], float)
    span = numbers.max() - numbers.min()
    return (numbers - numbers.min()) / span if span else np.ones_like(numbers)
