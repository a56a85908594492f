"""Sweeps: points, what they share, and a flow that goes on where it stopped and outlives a failing point."""

from __future__ import annotations

from pathlib import Path

import pytest
from projects import ROOT, make_project

from pi0rl.errors import UserError
from pi0rl.experiment import freeze, open_experiment
from pi0rl.sweeps import Sweep, describe, experiments, grid_points, load_sweep

SWEEPS = sorted(path.stem for path in (ROOT / "params" / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_of_the_project_is_valid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sweep = load_sweep(name)
    for point in grid_points(sweep):
        assert experiments(name, sweep, point)[-1].stages == ("train", "evaluate", "report")


def test_points_share_what_they_have_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sweep = load_sweep("suites")
    chains = {point.name: experiments("suites", sweep, point) for point in grid_points(sweep)}
    assert len(chains) == 8
    assert len({demos.run_dir for demos, _, _ in chains.values()}) == 2  # one per suite
    assert len({sft.run_dir for _, sft, _ in chains.values()}) == 4  # one per suite and seed
    assert len({own.run_dir for _, _, own in chains.values()}) == 8
    for demos, sft, own in chains.values():
        assert own.sft_dir == sft.sft_dir == sft.run_dir / "sft"
        assert sft.demos_dir == demos.run_dir / "demos"
    ppo, grpo = chains["ppo-object-seed1"][-1], chains["grpo-object-seed1"][-1]
    assert (ppo.params.algorithm.adv_type, grpo.params.algorithm.adv_type) == ("gae", "grpo")
    assert ppo.params.seed == grpo.params.seed == 1


def test_a_point_opened_by_its_folder_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make_project(tmp_path / "p"))
    sweep = Sweep(experiment="quickstart", axes={"actor.optim.lr": [1e-4, 2e-4]})
    first, second = (experiments("s", sweep, point) for point in grid_points(sweep))
    assert first[0].run_dir == second[0].run_dir
    for part in (*first, *second):
        freeze(part)
        assert open_experiment(part.reference) == part


def test_listed_points_and_seeds_multiply() -> None:
    sweep = Sweep(experiment="quickstart", points=[{"sft.lr": 0.1, "sft.steps": 5}, {"sft.steps": 6}], seeds=[0, 1])
    points = grid_points(sweep)
    assert [point.name for point in points] == [
        "lr0.1-steps5-seed0",
        "lr0.1-steps5-seed1",
        "steps6-seed0",
        "steps6-seed1",
    ]
    assert points[1].overrides == ("sft.lr=0.1", "sft.steps=5", "seed=1")


def test_what_is_excluded_is_left_out_and_one_sft_policy_serves_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sweep = load_sweep("libero_spatial_tiny")
    points = grid_points(sweep)
    assert [point.name for point in points] == ["ppo-seed0", "ppo-seed1", "grpo-seed0", "ppo_flow_noise-seed0"]
    chains = [experiments("libero_spatial_tiny", sweep, point) for point in points]
    assert len({own.sft_dir for _, _, own in chains}) == 1
    assert [own.params.seed for _, _, own in chains] == [0, 1, 0, 0]
    with pytest.raises(UserError, match="no point has these coordinates"):
        grid_points(sweep.model_copy(update={"exclude": [{"algorithm": "pppo"}]}))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("experiment: quickstart\naxis: {}", "unknown key axis; did you mean axes?"),
        ("experiment: quickstart\naxes: {seedd: [1]}", "unknown key seedd"),
        ("experiment: quickstart\naxes: {seed: [1]}\nsearch: {trials: 1, space: {seed: {choices: [1]}}}", "leave one"),
    ],
)
def test_a_mistake_in_a_sweep_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    project = make_project(tmp_path / "p")
    monkeypatch.chdir(project)
    (project / "params" / "sweeps").mkdir()
    (project / "params" / "sweeps" / "s.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        _expand("s")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="known ones: s"):
        load_sweep("t")


def test_a_list_names_what_tells_the_points_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sweep = load_sweep("quickstart", ("runner.max_epochs=3",))
    first, *_, last = describe(sweep, grid_points(sweep)).splitlines()
    assert first == "lr3e-05-seed0  actor.optim.lr=3e-05  seed=0"
    assert last == "at every point: runner.max_epochs=3"
    search = describe(load_sweep("search"), ())
    assert search.startswith("bayesian search, 12 trials, env/success_once is maximised\n  actor.optim.lr: low=1e-05")
    with pytest.raises(UserError, match="overrides: lr: expected key=value"):
        load_sweep("quickstart", ("lr",))


def _expand(name: str) -> None:
    sweep = load_sweep(name)
    for point in grid_points(sweep):
        experiments(name, sweep, point)
