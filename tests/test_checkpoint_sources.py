"""Where checkpoints come from: a real DVC remote, a real MLflow model, the hub's cache without network; the stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from projects import environment
from tiny_policies import make_policy

from pi0rl.errors import UserError
from pi0rl.experiment import Experiment
from pi0rl.params import FetchParams
from pi0rl.policy.checkpoints import load_policy, save_policy
from pi0rl.policy.sources import ORIGIN, resolve
from pi0rl.policy.weights import sha256
from pi0rl.stages import fetch


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources") / "policy"
    save_policy(make_policy(), folder)
    return folder


def experiment(folder: Path, variant: str = "tiny", **keys: Any) -> Experiment:
    """As much of an experiment as the stage looks at."""
    model = SimpleNamespace(model=SimpleNamespace(variant=variant, precision=None))
    params = SimpleNamespace(fetch=FetchParams(**keys), actor=model)
    return cast(Experiment, SimpleNamespace(params=params, stage_dir=lambda stage: folder / stage))


def test_the_stage_records_the_origin_and_compares_digest_and_variant(policy: Path, tmp_path: Path) -> None:
    digest = sha256(policy / "model.safetensors")
    fetch.run(experiment(tmp_path, checkpoint=str(policy), sha256=digest))
    fetched = tmp_path / "sft/policy"
    origin = json.loads((fetched / ORIGIN).read_text())
    assert origin["location"] == str(policy)
    assert origin["sha256"]["model.safetensors"] == digest == sha256(fetched / "model.safetensors")
    assert load_policy(fetched).config == make_policy().config
    with pytest.raises(UserError, match=rf"no weights of digest 123, got model.safetensors {digest}"):
        fetch.run(experiment(tmp_path, checkpoint=str(policy), sha256="123"))
    with pytest.raises(UserError, match=r"is tiny, expected actor.model.variant pi05; set the variant to tiny"):
        fetch.run(experiment(tmp_path, "pi05", checkpoint=str(policy)))
    assert sha256(fetched / "model.safetensors") == digest


@pytest.mark.slow
def test_dvc_remote(policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository whose checkpoint is only in its remote."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    repository = tmp_path / "repository"
    (repository / "runs").mkdir(parents=True)
    author = {
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@b",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@b",
    }

    def run(*command: str) -> str:
        settings = environment() | author
        return subprocess.run(command, cwd=repository, check=True, env=settings, capture_output=True, text=True).stdout

    run("git", "init", "-q")
    dvc = str(Path(sys.executable).parent / "dvc")
    run(dvc, "init", "-q")
    run(dvc, "remote", "add", "-d", "store", str(tmp_path / "remote"))
    run("cp", "-r", str(policy), "runs/policy")
    run(dvc, "add", "-q", "runs/policy")
    run(dvc, "push", "-q")
    run("git", "add", "-A")
    run("git", "commit", "-qm", "policy")
    run("rm", "-r", "runs/policy", ".dvc/cache")
    source = resolve(f"dvc:{repository}#runs/policy", "HEAD")
    assert source.commit == run("git", "rev-parse", "HEAD").strip()
    assert load_policy(source.directory).config == make_policy().config
    with pytest.raises(UserError, match=r"not available from DVC .*; check repository, path and revision"):
        resolve(f"dvc:{repository}#runs/other", "HEAD")
    with pytest.raises(UserError, match="expected dvc:REPOSITORY#PATH"):
        resolve("dvc:somewhere")


@pytest.mark.slow
def test_mlflow_artifacts(policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    with mlflow.start_run() as run:
        mlflow.log_artifacts(str(policy), "model/artifacts/policy")
    source = resolve(f"runs:/{run.info.run_id}/model")
    assert load_policy(source.directory).config == make_policy().config
    with pytest.raises(UserError, match=r"not available from MLflow .* set MLFLOW_TRACKING_URI, or copy"):
        resolve("models:/nothing/3")


def hub_cache(policy: Path, root: Path, name: str) -> str:
    """The hub's cache as a download leaves it: files by digest, a snapshot of links, a branch."""
    repository, commit = root / f"models--someone--{name}", "1" * 40
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    for file in policy.iterdir():
        blob = repository / "blobs" / sha256(file)
        blob.write_bytes(file.read_bytes())
        (repository / "snapshots" / commit / file.name).symlink_to(
            os.path.relpath(blob, repository / "snapshots" / commit)
        )
    return commit


RESOLVE_EACH = """
import sys
from pi0rl.errors import UserError
from pi0rl.policy.sources import resolve
for source in sys.argv[1:]:
    try:
        print(resolve(source).commit)
    except UserError as error:
        print(error)
"""


def test_hub_without_network(policy: Path, tmp_path: Path) -> None:
    """The library reads its settings when it is imported: a process of its own, and only one."""
    commit = hub_cache(policy, tmp_path, "pi0")
    hub_cache(policy, tmp_path, "damaged")
    (blob,) = {f.resolve() for f in (tmp_path / "models--someone--damaged").rglob("model.safetensors")}
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    settings = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    sources = [f"someone/{name}@main" for name in ("pi0", "damaged", "else")]
    command = [sys.executable, "-c", RESOLVE_EACH, *sources]
    said = subprocess.run(command, env=settings, capture_output=True, text=True, check=True).stdout
    found, damaged, missing = said.splitlines()
    assert found == commit
    assert "which the hub gives for it; the download is damaged, delete" in damaged
    assert "not in the local cache" in missing
    assert "hf download someone/else --revision main --local-dir DIR" in missing
