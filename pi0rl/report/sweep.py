"""The comparison of a sweep's points: ``comparison.csv``, Markdown, and one page.

Results of different evaluation protocols never share a table or a chart: every protocol has a section of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pi0rl.errors import UserError
from pi0rl.evaluation.statistics import holm
from pi0rl.files import read_json, replace_directory
from pi0rl.report.plots import Chart
from pi0rl.report.published import SFT_WEIGHTS, PublishedTable, published_table
from pi0rl.report.sweep_plots import main_effects, parallel_coordinates
from pi0rl.report.tables import POLICY_LABELS, SPLIT_LABELS, suite_label
from pi0rl.report.templates import environment


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


@dataclass(frozen=True)
class Section:
    """What one protocol's points say on one split.

    Attributes:
        title: what to call it; empty for the only one.
        published: in the form of the published table.
        axes: what was varied, in the order of the columns.
        rows: of `comparison`.
        charts: main effects and parallel coordinates, where more than one value was tried.
        names: their files' names.
    """

    title: str
    split: str
    protocol: str
    published: PublishedTable
    axes: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]
    charts: tuple[Chart, ...]
    names: tuple[str, ...]


def write_sweep_report(sweep: str, points: Sequence[Finished], target: Path) -> Path:
    """Compare ``points`` in ``target``, replacing what is there; returns ``target``.

    The p-values of the points' paired tests are corrected for their number (Holm).

    Raises:
        UserError: a point's results.json is damaged, or an older version wrote it.
    """
    results = [(point, _results(point)) for point in points]
    table = comparison(results)
    sections = _sections(results, table)
    context = {"sweep": sweep, "points": len(points), "sections": sections}
    with replace_directory(target) as folder:
        table.to_csv(folder / "comparison.csv", index=False)
        for section in sections:
            for name, chart in zip(section.names, section.charts, strict=True):
                (folder / name).write_text(chart.svg, encoding="utf-8")
        for name in ("index.html", "report.md"):
            template = environment().get_template(f"sweep.{name.rpartition('.')[2]}.jinja")
            (folder / name).write_text(template.render(context), encoding="utf-8")
    return target


def comparison(results: Sequence[tuple[Finished, Mapping[str, Any]]]) -> pd.DataFrame:
    """One row per point, split and suite: what was varied, both policies' success, the change, the corrected p-value.

    Rows of different protocols stand in one file, under their hash; no number is taken over several of them but
    Holm's correction, which is for all tests of the sweep.
    """
    rows = []
    for point, content in results:
        scores = {(row["policy"], row["split"], row["suite"]): row for row in content["rows"]}
        for test in content["comparisons"]:
            if test["suite"] == "all":
                continue
            before, after = (scores[test[side], test["split"], test["suite"]] for side in ("before", "after"))
            varied = {axis: value for axis, value in point.coordinates.items() if axis != "suite"}
            rows.append(
                {
                    "point": point.name,
                    **varied,
                    "protocol": content["protocol"],
                    "split": test["split"],
                    "suite": suite_label(test["suite"]),
                    "before": before["k"] / before["n"],
                    "trained": POLICY_LABELS.get(test["after"], test["after"]),
                    "after": after["k"] / after["n"],
                    "low": after["wilson"][0],
                    "high": after["wilson"][1],
                    "change": test["change"],
                    "gained": test["gained"],
                    "lost": test["lost"],
                    "episodes": test["n"],
                    "errors": before["errors"] + after["errors"],
                    "p": test["mcnemar_p"],
                }
            )
    table = pd.DataFrame(rows)
    if rows:
        table["p_holm"] = holm(table["p"].tolist())
    return table


def _results(point: Finished) -> dict[str, Any]:
    path = point.report_dir / "results.json"
    content = read_json(path, ("rows", "comparisons", "tasks", "protocol", "checkpoints_sha256"))
    if SFT_WEIGHTS not in content["checkpoints_sha256"]:
        raise UserError(f"{path}: no digest of {SFT_WEIGHTS}; bring the run's files back and run `pi0rl report` again")
    return content


def _sections(results: Sequence[tuple[Finished, Mapping[str, Any]]], table: pd.DataFrame) -> tuple[Section, ...]:
    if table.empty:
        return ()
    axes = dict.fromkeys(axis for point, _ in results for axis in point.coordinates)
    columns = tuple(axis for axis in axes if axis in table and axis != "suite")
    groups = sorted(set(zip(table["protocol"], table["split"], strict=True)))
    sections = []
    for number, (protocol, split) in enumerate(groups):
        rows = table.loc[(table["protocol"] == protocol) & (table["split"] == split)]
        judged = [(point.coordinates, content) for point, content in results if content["protocol"] == protocol]
        varied = [axis for axis in (*columns, "suite") if axis != "seed"]
        charts = {"effects": main_effects(rows, varied), "points": parallel_coordinates(rows, varied)}
        drawn = {f"{name}{number or ''}.svg": chart for name, chart in charts.items() if chart is not None}
        sections.append(
            Section(
                title=f"Protocol {protocol}, {SPLIT_LABELS[split]}" if len(groups) > 1 else "",
                split=split,
                protocol=protocol,
                published=published_table(judged, split),
                axes=columns,
                rows=tuple(rows.to_dict("records")),
                charts=tuple(drawn.values()),
                names=tuple(drawn),
            )
        )
    return tuple(sections)
