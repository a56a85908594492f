"""Write the report of a run: results.json, report.md, index.html, and the charts and videos they show."""

from __future__ import annotations

import base64
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from pi0rl import provenance
from pi0rl.errors import UserError
from pi0rl.files import replace_directory
from pi0rl.report import plots
from pi0rl.report.inputs import Run, read_run
from pi0rl.report.tables import POLICY_LABELS, SPLIT_LABELS, SUITE_LABELS, Summary, summarise
from pi0rl.report.videos import Pair, choose_pairs

# The page stays below 20 MB; base64 makes 4 bytes of 3.
_MAX_VIDEO_BYTES = 13_000_000


@dataclass(frozen=True)
class Cost:
    """One line of what a run took: what, how much, and an optional remark."""

    name: str
    value: str


def write_report(run_dir: Path, report_dir: Path, experiment: str) -> None:
    """Write the report of a finished run into a folder, replacing the report that is there.

    Everything is derived from the run's files. ``results.json`` is equal for equal runs; what may differ between them
    (wall times, versions, the commit) is in ``run.json`` and in the last section of ``report.md`` and of the page.

    Args:
        run_dir: the folder of the run, ``runs/<experiment>``.
        report_dir: where to write, ``reports/<experiment>``; it appears only when the report is complete.
        experiment: the name to show.

    Raises:
        UserError: the run is not finished, its episode table supports no conclusion, or the folder cannot be written.
    """
    run = read_run(run_dir)
    summary = summarise(run.episodes)
    _refuse_foreign_folder(report_dir)
    try:
        with replace_directory(report_dir) as folder:
            _write_files(run, summary, folder, experiment)
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
        "params_sha256": provenance.text_hash(run.params),
        "checkpoints_sha256": provenance.checkpoint_hashes(run.directory),
    }


def _write_files(run: Run, summary: Summary, folder: Path, experiment: str) -> None:
    numbers = results(run, summary)
    facts = _facts(run, experiment)
    _write_json(folder / "results.json", numbers)
    _write_json(folder / "run.json", facts)
    pairs: tuple[Pair, ...] = ()
    if summary.headline:
        before, after = summary.headline.before, summary.headline.after
        pairs = choose_pairs(run.episodes, run.directory / "evaluate", before, after, _MAX_VIDEO_BYTES)
    charts = {f"tasks_{split}": plots.task_chart(summary.tasks_of(split), summary.policies) for split in summary.splits}
    overview = plots.learning_overview(run.sft_metrics, run.metrics)
    if overview:
        charts["learning"] = overview
    for name, chart in charts.items():
        (folder / f"{name}.svg").write_text(chart.svg, encoding="utf-8")
    _copy_videos(pairs, folder / "videos")
    context = {
        "experiment": experiment,
        "summary": summary,
        "numbers": numbers,
        "facts": facts,
        "params": run.params,
        "pairs": pairs,
        "effort": effort(run),
        "stages": run.stages,
        "training_time": training_time(run.timing),
        "charts": charts,
        "curves": plots.learning_charts(run.sft_metrics, run.metrics),
    }
    environment = _environment()
    for template, name in (("report.md.jinja", "report.md"), ("page.html.jinja", "index.html")):
        (folder / name).write_text(environment.get_template(template).render(context), encoding="utf-8")


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


def training_time(timing: pd.DataFrame) -> tuple[Cost, ...]:
    """Where the wall time of training went: the sum of every ``time/*``, the mean of every ``perf/*``."""
    times = {
        str(c).removeprefix("time/"): float(timing[c].to_numpy().sum()) for c in timing if str(c).startswith("time/")
    }
    rates = {
        str(c).removeprefix("perf/"): float(timing[c].to_numpy().mean()) for c in timing if str(c).startswith("perf/")
    }
    return (
        *(Cost(_spoken(name), duration(seconds)) for name, seconds in times.items()),
        *(Cost(_spoken(name), f"{rate:,.3g} on average") for name, rate in rates.items()),
    )


def percent(rate: float) -> str:
    """0.834 -> '83.4 %'."""
    return f"{100 * rate:.1f} %"


def points(change: float) -> str:
    """0.28 -> '+28.0'; a true minus sign for a loss, and no sign for none."""
    return f"{100 * change:+.1f}".replace("-", "−") if change else "0"


def p_value(p: float) -> str:
    """0.0312 -> '0.031', 8.1e-7 -> '8.1e-07'."""
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"


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


def _facts(run: Run, experiment: str) -> dict[str, object]:
    commit = provenance.commit(Path(__file__).resolve().parents[2])
    return {
        "experiment": experiment,
        "commit": commit.hash,
        "uncommitted_changes": commit.dirty,
        "code": str(commit),
        "versions": provenance.versions(),
        "stages": [asdict(stage) for stage in run.stages],
    }


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("pi0rl", "report"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "percent": percent,
        "points": points,
        "p_value": p_value,
        "duration": duration,
        "policy": lambda name: POLICY_LABELS.get(name, name),
        "suite": lambda name: SUITE_LABELS.get(name, name),
        "split": lambda name: SPLIT_LABELS.get(name, name),
        "inline": plots.inline,
        "data_uri": _data_uri,
    }
    return environment


def _data_uri(video: Path) -> str:
    return f"data:video/mp4;base64,{base64.b64encode(video.read_bytes()).decode()}"


def _copy_videos(pairs: tuple[Pair, ...], folder: Path) -> None:
    if pairs:
        folder.mkdir()
    for pair in pairs:
        for side in (pair.before, pair.after):
            shutil.copyfile(side.video, folder / side.video.name)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _refuse_foreign_folder(report_dir: Path) -> None:
    """The folder is replaced as a whole, so it must be empty or hold a report."""
    if report_dir.exists() and not (report_dir.is_dir() and (report_dir / "results.json").exists()):
        if report_dir.is_dir() and not any(report_dir.iterdir()):
            return
        raise UserError(f"{report_dir}: exists and holds no report, expected a free path; choose another or remove it")
