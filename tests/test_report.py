"""The report of a small, made-up but complete run folder, down to the page in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pandas as pd
import pytest
import yaml
from browser import require_readable

from pi0rl.errors import UserError
from pi0rl.evaluation.protocols import experiment_protocol
from pi0rl.evaluation.statistics import wilson_interval
from pi0rl.params import load_params
from pi0rl.provenance import Commit, commit
from pi0rl.report.changes import params_changes
from pi0rl.report.costs import throughput
from pi0rl.report.inputs import read_run
from pi0rl.report.page import write_report
from pi0rl.report.plots import inline, learning_charts
from pi0rl.report.seeds import sibling_runs, summarise_seeds
from pi0rl.report.tables import ALL_SUITES, FAILURE_KINDS, suite_label, summarise
from pi0rl.report.videos import choose_failures

_OBJECTS = ("alphabet soup", "cream cheese", "salad dressing", "bbq sauce", "ketchup")
_OBJECTS += ("tomato sauce", "butter", "milk", "chocolate pudding", "orange juice")
_PARAMS = "suites: [libero_object, libero_spatial]\nevaluation: {{episodes_per_task: {episodes_per_task}}}\n"
_FAILURES = ("never grasped", "dropped", "wrong object", "timeout")
_RATES = {"sft": {"libero_object": 0.5, "libero_spatial": 0.7}, "ppo": {"libero_object": 0.85, "libero_spatial": 0.5}}


def make_run(run: Path, episodes_per_task: int = 10, seconds: float = 100.0) -> Path:
    """A run folder as the stages leave it: two suites of ten tasks, better on one, worse on the other."""
    for stage in ("demos", "sft", "train", "evaluate"):
        (run / stage).mkdir(parents=True)
        write_record(run / stage, seconds)
    (run / "params.yaml").write_text(_PARAMS.format(episodes_per_task=episodes_per_task))
    for stage in ("sft", "train"):
        (run / stage / "policy").mkdir()
        (run / stage / "policy" / "model.safetensors").write_bytes(stage.encode())
    _write_curves(run)
    _episodes(run, episodes_per_task).to_parquet(run / "evaluate" / "episodes.parquet")
    return run


def write_record(folder: Path, *seconds: float, gpus: tuple[str, ...] = (), commit: str = "0123abcd") -> None:
    """What a stage took, as `pi0rl.invocations` writes it."""
    machine = {"cores": 3, "cpu": "a processor", "gpus": gpus, "renderer": "egl: a renderer"}
    made_with = {"machine": machine, "commit": {"hash": commit, "dirty": False}, "versions": {"torch": "2.13.0"}}
    entries = [{"started": "2025-01-01T10:00:00+00:00", "seconds": each} | made_with for each in seconds]
    (folder / "timing.json").write_text(json.dumps(entries))


def _write_curves(run: Path) -> None:
    iteration = np.arange(20)
    noise = np.random.default_rng(0).normal(size=(4, 20))
    metrics = {
        "iteration": iteration,
        "env/success_once": 0.4 + 0.4 * (1 - np.exp(-iteration / 8)) + 0.02 * noise[0],
        "env/episode_len": 110 - iteration + noise[1],
        "actor/approx_kl": np.where(iteration == 0, np.nan, 0.03 + 0.005 * noise[2]),
        "critic/explained_variance": 0.5 * (1 - np.exp(-iteration / 3)) + 0.02 * noise[3],
        "env/num_trajectories": np.full(20, 80),
        "env/steps": np.full(20, 8000),
    }
    pd.DataFrame(metrics).to_csv(run / "train" / "metrics.csv", index=False)
    timing = {"iteration": iteration, "time/rollout": np.full(20, 20.0), "perf/env_steps_per_s": np.full(20, 400.0)}
    pd.DataFrame(timing).to_csv(run / "train" / "timing.csv", index=False)
    step = np.arange(0, 1100, 10)
    success = np.where((step >= 700) & (step % 100 == 0), step / 2000, np.nan)  # validated now and then
    sft = {"step": step, "sft/loss": np.exp(-step / 400) + 0.05 * noise[0, step % 20] ** 2, "sft/success_once": success}
    pd.DataFrame(sft).to_csv(run / "sft" / "metrics.csv", index=False)


def _episodes(run: Path, episodes_per_task: int) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    protocol = experiment_protocol(load_params(run / "params.yaml")).hash
    rows = []
    for policy, rates in _RATES.items():
        index = 0
        for suite, rate in rates.items():
            for task_id, name in enumerate(_OBJECTS):
                for init_state_id in range(episodes_per_task):
                    success = bool(rng.random() < rate)
                    video = ""
                    if init_state_id < 2 and task_id < 3:
                        video = f"videos/{policy}_{suite}_{task_id}_{init_state_id}.mp4"
                        _write_video(run / "evaluate" / video, success)
                    rows.append(
                        {
                            "policy": policy,
                            "protocol": protocol,
                            "split": "held_out",
                            "seed": 1000,
                            "index": index,
                            "suite": suite,
                            "task_id": task_id,
                            "task": f"pick_up_the_{name.replace(' ', '_')}",
                            "language": f"pick up the {name} & place it in the basket",
                            "init_state_id": init_state_id,
                            "state_hash": f"{suite}-{task_id}-{init_state_id}",
                            "scene_seed": 0,
                            "success_once": success,
                            "success_at_end": success,
                            "steps": 90 if success else 280,
                            "seconds": 2.5,
                            "failure": "" if success else _FAILURES[index % 4],
                            "error": "",
                            "video": video,
                        }
                    )
                    index += 1
    return pd.DataFrame(rows)


def _write_video(path: Path, success: bool) -> None:
    path.parent.mkdir(exist_ok=True)
    ramp = np.linspace(0, 1, 64)
    frames = [np.stack([np.outer(ramp, np.roll(ramp, 4 * t))] * 3, axis=-1) for t in range(8)]
    colour = np.array([60, 200, 160] if success else [200, 120, 60])
    iio.imwrite(path, (np.stack(frames) * colour).astype(np.uint8), fps=10, codec="libx264")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "small")


@pytest.fixture(scope="module")
def report(run: Path) -> Path:
    folder = run.parent / "reports" / "small"
    write_report(run, folder, "small")
    return folder


def test_results_count_the_episode_table(run: Path, report: Path) -> None:
    episodes = pd.read_parquet(run / "evaluate" / "episodes.parquet")
    results = json.loads((report / "results.json").read_text())
    assert [(r["policy"], r["suite"]) for r in results["rows"]] == [
        (policy, suite) for policy in ("sft", "ppo") for suite in ("libero_spatial", "libero_object")
    ]
    for row in results["rows"]:
        chosen = episodes[(episodes["policy"] == row["policy"]) & (episodes["suite"] == row["suite"])]
        assert (row["split"], row["k"], row["n"]) == ("held_out", chosen["success_once"].sum(), 100)
        low, high = row["wilson"]
        assert low < row["k"] / row["n"] < high
    gained = {k: sum(r["k"] for r in results["rows"] if r["policy"] == k) for k in ("sft", "ppo")}
    assert results["gained"] - results["lost"] == gained["ppo"] - gained["sft"]
    assert 0 < results["mcnemar_p"] <= 1
    assert sum(task["counts"]["ppo"][0] for task in results["tasks"]) == gained["ppo"]
    assert [r["suite"] for r in results["regressions"]] == ["libero_spatial"]
    assert len(results["checkpoints_sha256"]) == 2


def test_equal_runs_give_equal_reports_but_for_the_times(report: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    write_report(make_run(tmp_path / "run", seconds=250.0), again, "small")
    assert (again / "results.json").read_bytes() == (report / "results.json").read_bytes()
    for name in ("learning.svg", "tasks_held_out.svg"):
        assert (again / name).read_bytes() == (report / name).read_bytes()
    first, second = ((folder / "report.md").read_text().split("\n## This run\n") for folder in (report, again))
    assert first[0] == second[0]
    assert first[1] != second[1]


def test_the_page_stands_alone_and_has_no_name_twice(report: Path) -> None:
    page = (report / "index.html").read_text()
    assert len(page.encode()) < 20e6
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page)
    assert "url(http" not in page
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    pairs, failures = page.count('class="card pair"'), page.count('<figure class="card"><video')
    assert page.count("<video ") == 2 * pairs + failures
    assert min(pairs, failures) > 0
    assert all("aria-label=" in tag for tag in re.findall(r"<(?:video|svg) [^>]*>", page))
    assert page.count(' poster="data:image/jpeg;base64,/9j/') == page.count("<video ")  # how it ended, before it plays
    assert "&amp; place it" in page


def test_markdown_shows_existing_files_and_whole_tables(report: Path) -> None:
    text = (report / "report.md").read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (report / target).is_file(), target
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) >= 6
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


def test_charts_take_the_colours_of_the_page(run: Path) -> None:
    charts = learning_charts([(pd.read_csv(run / "train" / "metrics.csv"),)])
    assert [chart.description.split(":")[0] for chart in charts] == [
        "Success of training episodes",
        "Episode length (steps)",
        "Approximate KL per update",
        "Explained variance of the critic",
    ]
    svg = inline(charts[0])
    assert "var(--trained)" in svg
    assert "DejaVu" not in svg
    assert not re.search(r"#[0-9a-f]{6}\b(?!\))", svg.replace("#ffffff", ""))


def test_runs_that_differ_in_the_seed_alone_show_the_spread(run: Path, tmp_path: Path) -> None:
    others = {"seed1": "seed: 1\n", "seed2": "seed: 2\n", "other": "seed: 3\nsft: {lr: 0.5}\n"}
    for name, lines in others.items():
        shutil.copytree(run, tmp_path / "runs" / name)
        path = tmp_path / "runs" / name / "params.yaml"
        path.write_text(lines + path.read_text())
    training = pd.read_csv(run / "train" / "metrics.csv")
    training["env/success_once"] += 0.1
    training.to_csv(tmp_path / "runs" / "seed2" / "train" / "metrics.csv", index=False)
    siblings = sibling_runs(load_params(run / "params.yaml"), tmp_path / "runs")
    assert [folder.name for folder in siblings] == ["seed1", "seed2"]
    write_report(run, tmp_path / "report", "small", siblings)
    page = (tmp_path / "report" / "index.html").read_text()
    assert "3 runs that differ in the seed alone" in page
    assert "Success of training episodes (3 seeds): 0.4" in page
    summary = summarise_seeds([read_run(folder) for folder in (run, *siblings)])
    assert summary is not None
    assert [result.seed for result in summary.runs] == [0, 1, 2]
    low, high = summary.after[1]
    assert low < summary.after[0] < high
    assert summarise_seeds([read_run(run)]) is None


def test_seeds_that_start_from_one_policy_count_it_once(run: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        folder = tmp_path / "runs" / f"seed{seed}"
        shutil.copytree(run, folder)
        params = folder / "params.yaml"
        params.write_text(f"seed: {seed}\nsft: {{seed: 0}}\n{params.read_text()}")
        folders = {"run": f"runs/seed{seed}", "sft_dir": "runs/shared/sft"}
        (folder / "dvc.yaml").write_text(yaml.safe_dump({"vars": [folders]}))
    shutil.copytree(run / "sft", tmp_path / "runs" / "shared" / "sft")
    first = tmp_path / "runs" / "seed0"
    runs = [
        read_run(folder) for folder in (first, *sibling_runs(load_params(first / "params.yaml"), tmp_path / "runs"))
    ]
    assert [each.sft_dir for each in runs] == [tmp_path / "runs" / "shared" / "sft"] * 2
    assert [stage.label for stage in runs[0].stages] == ["demos", "sft (shared)", "train", "evaluate"]
    summary, alone = summarise_seeds(runs), summarise_seeds([runs[0], replace(runs[1], sft_dir=runs[1].directory)])
    assert summary is not None
    assert alone is not None
    assert summary.before[0] == alone.before[0]
    assert summary.before[1] != alone.before[1]


def test_failures_are_counted_and_shown_by_kind(run: Path, report: Path) -> None:
    episodes = pd.read_parquet(run / "evaluate" / "episodes.parquet")
    summary = summarise(episodes)
    assert set(FAILURE_KINDS) == set(_FAILURES)
    for policy in summary.policies:
        failed = episodes[(episodes["policy"] == policy) & ~episodes["success_once"]]
        assert summary.failures(policy) == failed["failure"].value_counts().to_dict()
    shown = choose_failures(episodes, run / "evaluate", "ppo", per_kind=1, max_bytes=10**7)
    assert shown
    assert all(failure.kind == kind and not failure.side.success for kind, (failure,) in shown.items())
    assert choose_failures(episodes, run / "evaluate", "ppo", per_kind=1, max_bytes=10) == {}
    page = (report / "index.html").read_text()
    assert all(meaning in page for meaning in FAILURE_KINDS.values())


def test_errors_are_counted_apart_and_late_losses_shown(run: Path) -> None:
    episodes = pd.read_parquet(run / "evaluate" / "episodes.parquet")
    broken = (episodes["policy"] == "ppo") & (episodes["index"] == 0)
    lost = episodes["success_once"] & (episodes["index"] == 199)
    episodes = episodes.assign(error=np.where(broken, "diverged", ""), success_at_end=episodes["success_once"] & ~lost)
    row = summarise(episodes).row("ppo", "held_out", episodes["suite"].iloc[0])
    assert (row.n, row.errors) == (99, 1)
    assert summarise(episodes).errors == 1
    rows = summarise(episodes).rows
    assert sum(row.k - row.k_at_end for row in rows) == lost.sum()


def test_a_regression_is_marked_with_what_its_test_says(run: Path, report: Path) -> None:
    (worse,) = summarise(pd.read_parquet(run / "evaluate" / "episodes.parquet")).regressions
    assert worse.verdict == ("unlikely to be chance" if worse.holm_p < 0.05 else "may be chance")
    page = (report / "index.html").read_text()
    assert f"PPO is {-100 * worse.change:.1f} points worse on Spatial (held-out init states)." in page
    assert f"{worse.gained} gained, {worse.lost} lost" in page
    assert f"{worse.lost} lost, p = " in (report / "report.md").read_text()


def test_energy_takes_the_power_that_the_gpus_drew_and_every_invocation(run: Path, tmp_path: Path) -> None:
    with_gpus = tmp_path / "run"
    shutil.copytree(run, with_gpus)
    write_record(with_gpus / "train", 7200.0, 3600.0, gpus=("a GPU", "a GPU"))
    timing = pd.read_csv(run / "train" / "timing.csv")
    for gpu, watts in enumerate((300.0, 500.0)):
        timing[f"system/gpu_{gpu}_utilization_percentage"] = 90.0
        timing[f"system/gpu_{gpu}_power_usage_watts"] = watts
    timing.to_csv(with_gpus / "train" / "timing.csv", index=False)
    costs = {cost.name: cost.value for cost in throughput(read_run(with_gpus))}
    energy = 300 / 3600 * 30 + 3 * 830  # Wh
    assert costs["Energy, roughly (10 W per core, 400 W per GPU as measured in training)"] == f"{energy / 1000:.2g} kWh"
    assert costs["Machine hours"] == "0.08 on 3 cores, 3.00 on 3 cores and 2 GPUs"
    assert costs["Training, environment steps per second"] == f"{20 * 8000 / 10800:.0f}"


def test_a_time_that_was_recorded_for_the_last_invocation_alone_is_made_good(run: Path, tmp_path: Path) -> None:
    old = tmp_path / "run"
    shutil.copytree(run, old)
    (old / "train" / "timing.json").write_text('{"started": "2025-01-01T10:00:00+00:00", "seconds": 12.0}')
    pd.DataFrame({"iteration": range(20), "time/step": 30.0}).to_csv(old / "train" / "timing.csv", index=False)
    read = read_run(old)
    assert {stage.stage: stage.seconds for stage in read.stages}["train"] == 600.0
    costs = {cost.name.partition(",")[0]: cost.value for cost in throughput(read)}
    assert costs["Machine hours"].endswith("0.17 on a machine that is not recorded")
    assert "Energy" not in costs


def test_a_report_says_with_what_each_stage_was_made(run: Path, report: Path, tmp_path: Path) -> None:
    assert "git checkout 0123abcd\n" in (report / "index.html").read_text()
    text = (report / "report.md").read_text()
    assert "| demos, sft, train, evaluate | made with |\n|---|---|\n| commit | 0123abcd |\n" in text
    assert "| renderer | egl: a renderer |" in text
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    write_record(moved / "train", 100.0, commit="4567cdef")
    write_report(moved, tmp_path / "report", "moved")
    page, text = ((tmp_path / "report" / name).read_text() for name in ("index.html", "report.md"))
    assert "git checkout" not in page
    assert "| demos, sft, evaluate | made with |\n|---|---|\n| commit | 0123abcd |" in text
    assert "| train | made with |\n|---|---|\n| commit | 4567cdef |" in text


def test_episodes_of_another_protocol_than_the_params_are_refused(run: Path, tmp_path: Path) -> None:
    changed = tmp_path / "run"
    shutil.copytree(run, changed)
    with (changed / "params.yaml").open("a") as params:
        params.write("env: {settle_steps: 20}\n")
    with pytest.raises(UserError, match=r"episodes\.parquet: played under protocol .*, that of .*params\.yaml"):
        read_run(changed)


def test_params_are_compared_with_the_nearest_file(tmp_path: Path) -> None:
    (tmp_path / "far.yaml").write_text("seed: 9\nsuites: [libero_10]\nsft: {lr: 0.1}\n")
    (tmp_path / "near.yaml").write_text("sft: {lr: 0.1}\n")
    (tmp_path / "broken.yaml").write_text("sft: {learning_rate: 0.1}\n")
    changes = params_changes(
        load_params(tmp_path / "far.yaml").model_copy(update={"suites": ("libero_object",)}), tmp_path
    )
    assert changes is not None
    assert (changes.base, changes.values) == ("far", {"suites": (["libero_10"], ["libero_object"])})
    assert suite_label("libero_object_swap") == "Object, swap"


def test_a_run_without_training_has_a_report(run: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    (bare / "evaluate").mkdir(parents=True)
    shutil.copy(run / "params.yaml", bare)
    episodes = pd.read_parquet(run / "evaluate" / "episodes.parquet")
    episodes[episodes["policy"] == "sft"].assign(video="").to_parquet(bare / "evaluate" / "episodes.parquet")
    write_report(bare, tmp_path / "report", "bare")
    assert json.loads((tmp_path / "report" / "results.json").read_text())["mcnemar_p"] is None
    assert "#learning" not in (tmp_path / "report" / "index.html").read_text()


def test_a_refused_run_leaves_the_old_report_and_nothing_else(run: Path, tmp_path: Path) -> None:
    broken, folder = tmp_path / "broken", tmp_path / "reports" / "small"
    shutil.copytree(run, broken)
    write_report(broken, folder, "small")
    before = (folder / "results.json").read_bytes()
    (broken / "evaluate" / "videos" / "ppo_libero_object_0_0.mp4").unlink()
    with pytest.raises(UserError, match=r"ppo_libero_object_0_0\.mp4: no such file"):
        write_report(broken, folder, "small")
    episodes = pd.read_parquet(broken / "evaluate" / "episodes.parquet")
    episodes.iloc[:-1].to_parquet(broken / "evaluate" / "episodes.parquet")
    with pytest.raises(UserError, match="199 episodes completed, 200 planned"):
        write_report(broken, folder, "small")
    (broken / "evaluate" / "episodes.parquet").unlink()
    with pytest.raises(UserError, match="run `pi0rl evaluate` first"):
        write_report(broken, folder, "small")
    assert (folder / "results.json").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == ["small"]


def test_a_folder_that_is_no_report_is_never_replaced(run: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds no report"):
        write_report(run, tmp_path, "small")
    blocked = tmp_path / "thesis.tex" / "report"
    with pytest.raises(UserError, match="cannot write the report"):
        write_report(run, blocked, "small")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_summary_orders_as_the_published_table(run: Path) -> None:
    episodes = pd.read_parquet(run / "evaluate" / "episodes.parquet")
    grpo = episodes[episodes["policy"] == "ppo"].assign(policy="grpo")
    official = pd.concat([episodes, grpo]).assign(split="official")
    summary = summarise(pd.concat([official, episodes, grpo]))
    assert summary.policies == ("sft", "ppo", "grpo")
    assert summary.splits == ("held_out", "official")
    assert summary.suites == ("libero_spatial", "libero_object")
    assert summary.headline is not None
    assert (summary.headline.after, summary.headline.split) == ("ppo", "held_out")


def test_all_suites_together_are_a_family_of_tests_and_their_change_is_that_of_the_means(run: Path) -> None:
    episodes = pd.read_parquet(run / "evaluate" / "episodes.parquet")
    unequal = episodes[(episodes["suite"] != "libero_spatial") | (episodes["task_id"] < 3)]
    both = summarise(pd.concat([unequal, unequal.assign(split="official")]))
    of_all = [c for c in both.comparisons if c.suite == ALL_SUITES]
    assert [c.holm_p for c in of_all] == [pytest.approx(min(1.0, 2 * c.mcnemar_p)) for c in of_all]
    assert both.headline is not None
    before, after = (both.mean(policy, "held_out").rate for policy in ("sft", "ppo"))
    assert both.headline.change == pytest.approx(after - before)
    assert both.headline.change != pytest.approx((both.headline.gained - both.headline.lost) / both.headline.n)


def test_the_plays_of_an_init_state_under_several_seeds_count_together(run: Path) -> None:
    once = pd.read_parquet(run / "evaluate" / "episodes.parquet")
    alone, again = summarise(once), summarise(pd.concat([once, once.assign(seed=1001)]))
    for row in alone.rows:
        same = again.row(row.policy, row.split, row.suite)
        assert same.n == 2 * row.n
        assert same.wilson == pytest.approx(row.wilson)
        assert row.wilson == pytest.approx(wilson_interval(row.k, row.n))
    assert [c.mcnemar_p for c in again.comparisons] == pytest.approx([c.mcnemar_p for c in alone.comparisons])


def test_commit_is_that_of_the_repository_itself_and_reports_do_not_make_it_dirty(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    for folder in ("params", "reports"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.yaml").write_text("seed: 0")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    (tmp_path / "reports" / "a.yaml").write_text("new")
    assert commit(tmp_path) == Commit(git("rev-parse", "HEAD"), dirty=False)
    (tmp_path / "params" / "a.yaml").write_text("seed: 1")
    assert commit(tmp_path).dirty
    assert str(commit(tmp_path / "params")) == "not a git checkout"


def test_chromium_opens_the_page_without_a_complaint(report: Path, tmp_path: Path) -> None:
    for scheme in ("light", "dark"):
        require_readable(report / "index.html", tmp_path, scheme)
