"""The command line: mistakes end in one line and exit code 2; experiments are frozen from one set of stages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from projects import ROOT, call, environment, make_project

from pi0rl.experiment import freeze, open_experiment, stage_params


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("project") / "p")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "quickstar"), ("params/quickstar.yaml", "did you mean quickstart?", "known ones: quickstart")),
        (("run", "quickstart", "--set", "seeed=1"), ("--set seeed=1: unknown key seeed", "did you mean seed?")),
        (("run", "quickstart", "--set", "sftt.steps=3"), ("unknown key sftt", "did you mean sft?")),
        (("sft", "quickstart", "--set", "seed"), ("expected key=value",)),
        (("sft", "quickstart", "--output", "elsewhere"), ("--output elsewhere", "expected a folder below")),
        (("sft", "quickstart", "--output", "runs/quickstart", "--set", "seed=1"), ("belongs to the plain",)),
        (("sft", "quickstart", "--output", "runs/taken/again"), ("cannot write", "runs/taken")),
    ],
)
def test_a_mistake_is_one_line(project: Path, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    (project / "runs").mkdir(exist_ok=True)
    (project / "runs" / "taken").write_text("a file where a folder should be")
    result = call(*arguments, cwd=project)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("pi0rl: error: ")
    assert result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words), result.stderr


def test_outside_a_project_it_says_so(tmp_path: Path) -> None:
    result = call("run", "quickstart", cwd=tmp_path)
    assert result.returncode == 2
    assert "not inside a pi0rl project" in result.stderr


def test_help_shows_examples() -> None:
    result = call("--help", cwd=ROOT)
    assert result.returncode == 0
    assert "pi0rl run quickstart --output runs/again" in result.stdout


def test_the_projects_own_experiment_is_not_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    experiment = open_experiment("quickstart")
    assert experiment.reference == "quickstart"
    assert experiment.run_dir == ROOT / "runs" / "quickstart"
    assert experiment.address("train") == "dvc.yaml:train"
    assert experiment.stages == ("resolve", "demos", "sft", "train", "evaluate", "report")


def test_a_frozen_experiment_has_the_same_stages(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    (project / "dvc.yaml").rename(project / "small.yaml")
    (project / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    try:
        experiment = open_experiment("quickstart", ("seed=7",), "runs/again")
        freeze(experiment)
    finally:
        (project / "small.yaml").rename(project / "dvc.yaml")
    root, derived = (yaml.safe_load(path.read_text()) for path in (ROOT / "dvc.yaml", experiment.dvc_file))
    assert derived["vars"][0]["run"] == "runs/again"
    assert experiment.report_dir == project / "reports" / "again"
    assert [name for name in root["stages"] if name != "resolve"] == list(derived["stages"])
    for name, stage in derived["stages"].items():
        assert stage.pop("wdir") == "../.."
        assert stage == root["stages"][name]
    monkeypatch.chdir(project / "runs")
    again = open_experiment(str(experiment.run_dir))
    assert again.params.seed == 7
    assert again.run_dir == experiment.run_dir


def test_fetch_takes_the_place_of_demos_and_sft(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    (project / "tokenizer").mkdir()
    experiment = open_experiment(
        "quickstart", ("fetch.checkpoint=someone/pi0", "fetch.assets=tokenizer"), "runs/fetched"
    )
    freeze(experiment)
    assert experiment.stages == ("fetch",)
    stage = yaml.safe_load(experiment.dvc_file.read_text())["stages"]["fetch"]
    assert stage["outs"] == ["${sft_dir}"]
    assert stage["deps"] == ["pi0rl/stages/fetch.py", "pi0rl/policy", "tokenizer"]
    assert {key.partition(".")[0] for key in stage_params(experiment, "fetch")} == {"fetch", "actor"}
    assert {"fetch.assets", "actor.model.variant"} <= stage_params(experiment, "fetch").keys()


@pytest.mark.parametrize(
    ("stage", "settings", "dependencies"),
    [
        ("fetch", ("fetch.checkpoint=dvc:../other#runs/policy",), ["../other/runs/policy"]),
        ("fetch", ("fetch.checkpoint=dvc:OTHER#/runs/policy",), ["OTHER/runs/policy"]),
        ("sft", ("sft.checkpoint=dvc:.#own",), ["own"]),
        ("fetch", ("fetch.checkpoint=dvc:../other#runs/policy", "fetch.revision=main"), []),  # the files of a commit
        ("fetch", ("fetch.checkpoint=dvc:file://OTHER#runs/policy",), []),  # those of the default branch
        ("fetch", ("fetch.checkpoint=dvc:../other#runs/remote",), []),  # not checked out
        ("fetch", ("fetch.checkpoint=dvc:../other",), []),  # refused by the stage
    ],
)
def test_files_as_they_lie_in_a_dvc_repository_are_dependencies(
    project: Path, monkeypatch: pytest.MonkeyPatch, stage: str, settings: tuple[str, ...], dependencies: list[str]
) -> None:
    monkeypatch.chdir(project)
    other = project.parent / "other"
    for folder in (other / "runs/policy", project / "own"):
        folder.mkdir(parents=True, exist_ok=True)
    experiment = open_experiment(
        "quickstart", tuple(setting.replace("OTHER", str(other)) for setting in settings), "runs/from-dvc"
    )
    freeze(experiment)
    found = yaml.safe_load(experiment.dvc_file.read_text())["stages"][stage]["deps"]
    own = ("pi0rl/stages/fetch.py", "pi0rl/policy", "${demos_dir}")
    assert [dep for dep in found if dep not in own] == [dep.replace("OTHER", str(other)) for dep in dependencies]


def test_every_dependency_of_the_real_stages_exists() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    named = {dep for stage in stages.values() for dep in stage["deps"] if "$" not in dep}
    assert [dep for dep in sorted(named) if not (ROOT / dep).exists()] == []


def test_every_params_key_of_the_real_stages_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    tree = open_experiment("quickstart").params.model_dump()
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for stage in stages.values():
        for key in [key for entry in stage.get("params", []) for keys in entry.values() for key in keys]:
            section = tree
            for part in key.split("."):
                section = section[part]


def test_status_says_what_is_up_to_date(project: Path) -> None:
    dvc = [str(Path(sys.executable).parent / "dvc"), "repro", "--single-item", "resolve"]
    subprocess.run(dvc, cwd=project, env=environment(), check=True, capture_output=True)
    assert call("status", "quickstart", cwd=project).stdout.splitlines()[0] == "resolve  up to date"


def test_status_writes_nothing_and_other_params_are_announced(project: Path) -> None:
    asked = ("status", "quickstart", "--output", "runs/other")
    result = call(*asked, cwd=project)
    assert result.returncode == 1
    assert result.stdout == "runs/other: not begun; `pi0rl run` with the same arguments begins it\n"
    assert not (project / "runs" / "other").exists()
    call("resolve", "quickstart", "--output", "runs/other", cwd=project)
    result = call("resolve", "quickstart", "--output", "runs/other", "--set", "seed=3", cwd=project)
    changed = "runs/other: params changed (seed: 0 -> 3, sft.seed: 0 -> 3); what depends on them runs again\n"
    assert result.stdout == changed
    result = call(*asked, cwd=project)
    assert result.stdout.startswith("runs/other: lies there with other params (seed: 3 -> 0, sft.seed: 3 -> 0);")
    assert "seed: 3" in (project / "runs" / "other" / "params.yaml").read_text()
