"""Write the report of a run: results.json, report.md, index.html, and the charts and videos they show."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from pi0rl import provenance
from pi0rl.errors import UserError
from pi0rl.evaluation.evaluator import FAILURES_PER_KIND
from pi0rl.files import replace_directory
from pi0rl.report import plots
from pi0rl.report.changes import params_changes
from pi0rl.report.costs import effort, throughput, training_time
from pi0rl.report.inputs import Run, read_run
from pi0rl.report.making import makings, one_commit
from pi0rl.report.seeds import read_siblings, summarise_seeds
from pi0rl.report.tables import (
    FAILURE_KINDS,
    POLICY_LABELS,
    RATES_NOTE,
    Summary,
    comparison_lines,
    comparison_note,
    result_lines,
    summarise,
)
from pi0rl.report.templates import environment
from pi0rl.report.videos import Failure, Pair, choose_failures, choose_pairs

# The page stays below 20 MB; base64 makes 4 bytes of 3.
_MAX_PAIR_BYTES, _MAX_FAILURE_BYTES = 9_000_000, 4_000_000


def write_report(
    run_dir: Path, report_dir: Path, experiment: str, siblings: Sequence[Path] = (), params_dir: Path | None = None
) -> None:
    """Write the report of a finished run into a folder, replacing the report that is there.

    Everything is derived from the run's files. ``results.json`` is equal for equal runs; what may differ between them
    (wall times, machines, versions, the commit) is as the stages recorded it, in ``run.json`` and in the last section
    of ``report.md`` and of the page.

    Args:
        run_dir: the folder of the run, ``runs/<experiment>``.
        report_dir: where to write, ``reports/<experiment>``; it appears only when the report is complete.
        experiment: the name to show.
        siblings: folders of runs that differ in the seed alone; curves and a table show the spread over them.
        params_dir: folder of params files; the nearest is what this run's params are compared with.

    Raises:
        UserError: the run is not finished, its episode table supports no conclusion, or the folder cannot be written.
    """
    run = read_run(run_dir)
    summary = summarise(run.episodes)
    _refuse_foreign_folder(report_dir)
    try:
        with replace_directory(report_dir) as folder:
            _write_files(run, read_siblings(siblings), summary, folder, experiment, params_dir)
    except OSError as error:
        raise UserError(f"{report_dir}: cannot write the report ({error}); expected a writable folder") from error


def results(run: Run, summary: Summary) -> dict[str, object]:
    """The content of ``results.json``: equal for equal runs, so without times, versions and names."""
    headline = summary.headline
    return {
        "rows": [asdict(row) for row in summary.rows],
        "means": [asdict(mean) for mean in summary.means],
        "mcnemar_p": headline.mcnemar_p if headline else None,
        "gained": headline.gained if headline else None,
        "lost": headline.lost if headline else None,
        "comparisons": [asdict(comparison) for comparison in summary.comparisons],
        "regressions": [asdict(comparison) for comparison in summary.regressions],
        "tasks": [asdict(task) for task in summary.tasks],
        "protocol": run.protocol.hash,
        "params_sha256": provenance.text_hash(run.params_text),
        "checkpoints_sha256": provenance.checkpoint_hashes({"sft": run.sft_dir, "train": run.directory / "train"}),
    }


def metrics(summary: Summary) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """The content of ``metrics.json``, numbers alone, for ``dvc metrics diff``: split -> policy -> suite."""
    success: dict[str, dict[str, dict[str, float]]] = {}
    change: dict[str, dict[str, dict[str, float]]] = {}
    for row in summary.rows:
        success.setdefault(row.split, {}).setdefault(row.policy, {})[row.suite] = row.rate
    for test in summary.comparisons:
        change.setdefault(test.split, {}).setdefault(test.after, {})[test.suite] = test.change
    return {"success": success, "change": change}


def _write_files(
    run: Run, siblings: tuple[Run, ...], summary: Summary, folder: Path, experiment: str, params_dir: Path | None
) -> None:
    numbers = results(run, summary)
    made = makings(run.stages)
    _write_json(folder / "results.json", numbers)
    _write_json(folder / "metrics.json", metrics(summary))
    _write_json(folder / "run.json", {"experiment": experiment, "stages": [asdict(stage) for stage in run.stages]})
    pairs, failures = _chosen_videos(run, summary, folder / "videos")
    curves = [(each.sft_metrics, each.metrics) for each in (run, *siblings)]
    charts = {f"tasks_{split}": plots.task_chart(summary.tasks_of(split), summary.policies) for split in summary.splits}
    overview = plots.learning_overview(curves)
    if overview:
        charts["learning"] = overview
    for name, chart in charts.items():
        (folder / f"{name}.svg").write_text(chart.svg, encoding="utf-8")
    context = {
        "experiment": experiment,
        "summary": summary,
        "protocol": run.protocol,
        "results_table": "\n".join(result_lines(summary, run.protocol)),
        "comparison_table": "\n".join(comparison_lines(summary)),
        "rates_note": RATES_NOTE,
        "comparison_note": comparison_note(POLICY_LABELS.get(summary.policies[0], summary.policies[0])),
        "seeds": summarise_seeds([run, *siblings]),
        "numbers": numbers,
        "makings": made,
        "commit": one_commit(made),
        "params": run.params_text,
        "changes": params_changes(run.params, params_dir) if params_dir else None,
        "pairs": pairs,
        "failures": failures,
        "failure_kinds": FAILURE_KINDS,
        "effort": effort(run),
        "throughput": throughput(run),
        "stages": run.stages,
        "training_time": training_time(run.timing),
        "alarms": run.alarms,
        "charts": charts,
        "curves": plots.learning_charts(curves),
    }
    for template, name in (("report.md.jinja", "report.md"), ("page.html.jinja", "index.html")):
        (folder / name).write_text(environment().get_template(template).render(context), encoding="utf-8")


def _chosen_videos(run: Run, summary: Summary, folder: Path) -> tuple[tuple[Pair, ...], dict[str, tuple[Failure, ...]]]:
    """The pairs of the headline's policies and the failures of its last policy, their videos copied to ``folder``."""
    evaluated = run.directory / "evaluate"
    pairs: tuple[Pair, ...] = ()
    if summary.headline:
        before, after = summary.headline.before, summary.headline.after
        pairs = choose_pairs(run.episodes, evaluated, before, after, _MAX_PAIR_BYTES)
    failures = choose_failures(run.episodes, evaluated, summary.judged, FAILURES_PER_KIND, _MAX_FAILURE_BYTES)
    sides = [side for pair in pairs for side in (pair.before, pair.after)]
    sides += [failure.side for of_kind in failures.values() for failure in of_kind]
    if sides:
        folder.mkdir()
    for side in sides:
        shutil.copyfile(side.video, folder / side.video.name)
    return pairs, failures


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _refuse_foreign_folder(report_dir: Path) -> None:
    """The folder is replaced as a whole, so it must be empty or hold a report."""
    if report_dir.exists() and not (report_dir.is_dir() and (report_dir / "results.json").exists()):
        if report_dir.is_dir() and not any(report_dir.iterdir()):
            return
        raise UserError(f"{report_dir}: exists and holds no report, expected a free path; choose another or remove it")
