"""The comparison of a sweep's points: ``comparison.csv``, Markdown, and one page with main effects."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from pi0rl.evaluation.statistics import holm
from pi0rl.files import replace_directory
from pi0rl.report import plots
from pi0rl.report.sweep_plots import main_effects, parallel_coordinates
from pi0rl.report.tables import POLICY_LABELS, SUITE_LABELS


@dataclass(frozen=True)
class Finished:
    """A point that has a report.

    Attributes:
        name: its folder's name.
        coordinates: axis -> label or value.
        report_dir: where its results.json is.
    """

    name: str
    coordinates: dict[str, Any]
    report_dir: Path


def write_sweep_report(sweep: str, points: Sequence[Finished], target: Path) -> Path:
    """Compare ``points`` in ``target``, replacing what is there; returns ``target``.

    The p-values of the points' paired tests are corrected for their number (Holm).
    """
    table = comparison(points)
    axes = [axis for axis in dict.fromkeys(axis for point in points for axis in point.coordinates) if axis != "seed"]
    charts = [chart for chart in (main_effects(table, axes), parallel_coordinates(table, axes)) if chart is not None]
    environment = Environment(
        loader=PackageLoader("pi0rl.report", "."),
        undefined=StrictUndefined,
        autoescape=select_autoescape(["html.jinja"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    columns = list(table.columns)
    context = {
        "sweep": sweep,
        "columns": columns,
        "rows": [
            [_shown(column, value) for column, value in zip(columns, row, strict=True)] for row in table.to_numpy()
        ],
        "charts": [plots.inline(chart) for chart in charts],
        "descriptions": [chart.description for chart in charts],
    }
    with replace_directory(target) as folder:
        table.to_csv(folder / "comparison.csv", index=False)
        for number, chart in enumerate(charts):
            (folder / f"chart{number}.svg").write_text(chart.svg, encoding="utf-8")
        for name in ("index.html", "report.md"):
            text = environment.get_template(f"sweep.{name.rpartition('.')[2]}.jinja").render(context)
            (folder / name).write_text(text, encoding="utf-8")
    return target


def comparison(points: Sequence[Finished]) -> pd.DataFrame:
    """One row per point and suite: what was varied, both policies' success, the change and its corrected p-value."""
    rows = []
    for point in points:
        results = json.loads((point.report_dir / "results.json").read_text(encoding="utf-8"))
        scores = {(row["policy"], row["suite"]): row for row in results["rows"]}
        for test in results["comparisons"]:
            if test["suite"] == "all":
                continue
            before, after = scores[test["before"], test["suite"]], scores[test["after"], test["suite"]]
            varied = {axis: value for axis, value in point.coordinates.items() if axis != "suite"}
            rows.append(
                {
                    "point": point.name,
                    **varied,
                    "suite": SUITE_LABELS.get(test["suite"], test["suite"]),
                    "before": before["k"] / before["n"],
                    "trained": POLICY_LABELS.get(test["after"], test["after"]),
                    "after": after["k"] / after["n"],
                    "low": after["wilson"][0],
                    "high": after["wilson"][1],
                    "change": test["change"],
                    "episodes": test["n"],
                    "p": test["mcnemar_p"],
                }
            )
    table = pd.DataFrame(rows)
    if rows:
        table["p_holm"] = holm(table["p"].tolist())
    return table


def _shown(column: str, value: Any) -> str:
    if column in ("before", "after", "low", "high"):
        return f"{100 * value:.1f} %"
    if column == "change":
        return f"{100 * value:+.1f}"
    return f"{value:.2g}" if column in ("p", "p_holm") else str(value)
