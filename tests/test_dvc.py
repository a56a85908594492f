"""What DVC owns works as its users know it: a remote, differences of metrics, plots, experiments."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from projects import ROOT, call, dvc, make_project

from pi0rl.files import replace_text

# The larger the learning rate, the more it learns
LEARN = """
import json, pathlib, sys, yaml
params = yaml.safe_load(open("runs/quickstart/params.yaml"))
success = params["actor"]["optim"]["lr"] * 1000
train, report = map(pathlib.Path, sys.argv[1:])
if train.name == "train":
    train.mkdir(exist_ok=True)
    rows = [f"{step},{step * success}" for step in range(3)]
    (train / "metrics.csv").write_text("\\n".join(["iteration,env/success_once", *rows]) + "\\n")
else:
    report.mkdir(parents=True, exist_ok=True)
    (report / "metrics.json").write_text(json.dumps({"success": {"ppo": {"libero_object": success}}}))
"""
STAGES = """
  train:
    cmd: python learn.py ${run}/train ${report}
    deps: ["${sft_dir}"]
    params:
      - ${params}: [actor.optim.lr]
    outs: ["${run}/train"]
  report:
    cmd: python learn.py ${run} ${report}
    deps: ["${run}/train"]
    params:
      - ${params}: [actor.optim.lr]
    outs:
      - ${report}: {cache: false}

"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository that has committed one run; metrics and plots are those of the project's own dvc.yaml."""
    folder = make_project(tmp_path / "p")
    stages, own = ((root / "dvc.yaml").read_text() for root in (folder, ROOT))
    text = stages.partition("metrics: []")[0] + STAGES + own[own.index("metrics:") :]
    replace_text(folder / "dvc.yaml", text)
    replace_text(folder / "learn.py", LEARN)
    replace_text(folder / "params" / "quickstart.yaml", "seed: 0\nactor: {optim: {lr: 3.0e-4}}\n")
    dvc("repro", cwd=folder)
    _commit(folder)
    return folder


def test_another_run_is_compared_with_the_committed_one(project: Path) -> None:
    """`dvc exp run -S`, `dvc metrics diff`, `dvc plots`, and `pi0rl run` finds all of it done."""
    dvc("exp", "run", "-S", "params/quickstart.yaml:actor.optim.lr=6.0e-4", cwd=project)
    (difference,) = json.loads(dvc("metrics", "diff", "--json", cwd=project))["reports/quickstart/metrics.json"].items()
    assert difference == ("success.ppo.libero_object", {"old": 0.3, "new": 0.6, "diff": pytest.approx(0.3)})
    dvc("plots", "show", "-o", "plots", cwd=project)
    page = (project / "plots" / "index.html").read_text()
    assert "Success of training episodes" in page
    assert "0.0006" in dvc("exp", "show", "--csv", cwd=project)
    assert "up to date" in dvc("status", cwd=project)
    result = call("run", "quickstart", cwd=project)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(": unchanged") == 5


def test_a_remote_brings_everything_to_another_machine(project: Path, tmp_path: Path) -> None:
    dvc("remote", "add", "-q", "-d", "store", str(tmp_path / "store"), cwd=project)
    dvc("push", cwd=project)
    _commit(project)
    elsewhere = tmp_path / "elsewhere"
    subprocess.run(["git", "clone", "-q", str(project), str(elsewhere)], check=True)
    dvc("pull", cwd=elsewhere)
    assert (elsewhere / "runs/quickstart/train/metrics.csv").read_text().splitlines()[2] == "1,0.3"
    assert "up to date" in dvc("status", cwd=elsewhere)


def _commit(folder: Path) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    for arguments in (("add", "-A"), ("commit", "-q", "-m", "run")):
        subprocess.run(["git", *identity, *arguments], cwd=folder, check=True)
