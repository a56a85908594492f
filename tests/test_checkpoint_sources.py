"""Where checkpoints come from: a real DVC remote, a real MLflow model, the hub's cache without network; the stage."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from projects import environment
from safetensors.torch import load_file, save_file
from tiny_policies import make_policy

from pi0rl.errors import UserError
from pi0rl.experiment import Experiment
from pi0rl.params import FetchParams
from pi0rl.policy.checkpoints import load_policy, save_policy
from pi0rl.policy.inspection import inspect
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
    with pytest.raises(UserError, match=rf"expected 123, got {digest} \(of model.safetensors\)"):
        fetch.run(experiment(tmp_path, checkpoint=str(policy), sha256="123"))
    with pytest.raises(UserError, match=r"is tiny, expected actor.model.variant pi05; set the variant to tiny"):
        fetch.run(experiment(tmp_path, "pi05", checkpoint=str(policy)))
    assert sha256(fetched / "model.safetensors") == digest


def test_a_digest_is_of_all_shards(policy: Path, tmp_path: Path) -> None:
    """What ``sha256sum`` says of its own lines; heads belong to the weights, a file of statistics does not."""
    shards = tmp_path / "shards"
    shards.mkdir()
    tensors = sorted(load_file(policy / "model.safetensors").items())
    for number, part in enumerate((tensors[:9], tensors[9:])):
        save_file(dict(part), shards / f"model-{number}.safetensors")
    save_file({"mean": tensors[0][1]}, shards / "policy_preprocessor_0.safetensors")

    def summed(files: str) -> str:
        command = f"(LC_ALL=C; sha256sum {files} | sha256sum)"
        return subprocess.run(command, shell=True, cwd=shards, check=True, capture_output=True, text=True).stdout[:64]

    wanted = summed("model-*.safetensors")
    one = sha256(shards / "model-0.safetensors")
    with pytest.raises(UserError, match=rf"expected {one}, got {wanted} \(of the 2 weight files together\)"):
        fetch.run(experiment(tmp_path, checkpoint=str(shards), sha256=one))
    with pytest.raises(UserError, match=r"vision width is 128"):  # the digest is right, the network of no size we know
        fetch.run(experiment(tmp_path, checkpoint=str(shards), sha256=wanted))
    assert any(wanted in line for line in itertools.islice(inspect(str(shards)), 4))
    save_file({"value_head.bias": tensors[0][1]}, shards / "pi0rl_heads.safetensors")
    wanted = summed("model-*.safetensors pi0rl_heads.safetensors")
    assert any(wanted in line for line in itertools.islice(inspect(str(shards)), 5))


@pytest.mark.parametrize(
    ("source", "revision", "says"),
    [
        ("org/name@abc", "def", "revision abc in the name, but revision def is given too; leave one of them out"),
        ("FOLDER", "main", "revision main is given, but a folder or MLflow URI has none; leave the revision out"),
        ("models:/name/3", "main", "a folder or MLflow URI has none"),
        ("org/-x", "main", r"org/-x@main: no such folder and not a hub id \(Repo id must use alphanumeric .*'org/-x'"),
        ("data/libero.@main", None, r"not a hub id \(.*\); expected a folder that is there, or org/name@revision"),
        ("org/name@a b", None, r"revision 'a b', expected a branch, tag or commit"),
        ("org/name@", None, r"revision '', expected a branch, tag or commit"),
        ("org/name", None, "no such checkpoint directory; expected a directory, a hub id org/name@revision"),
    ],
)
def test_names_that_mean_nothing(policy: Path, source: str, revision: str | None, says: str) -> None:
    with pytest.raises(UserError, match=says) as refusal:
        resolve(source.replace("FOLDER", str(policy)), revision)
    assert "\n" not in str(refusal.value)


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

    run("git", "init", "-q", "-b", "trunk")
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
    remote, commit = resolve(f"dvc:file://{repository}#runs/policy"), source.commit  # a URL: its default branch
    assert (remote.revision, remote.commit) == (None, commit)
    (repository / "runs/policy").mkdir()
    (repository / "runs/policy/model.safetensors").write_bytes(b"newer")
    folder = resolve(f"dvc:{repository}#runs/policy")  # a folder: what lies in it
    assert folder.commit is None
    assert (folder.directory / "model.safetensors").read_bytes() == b"newer"
    with pytest.raises(UserError, match=r"not available from DVC .*; check repository, path and revision"):
        resolve(f"dvc:{repository}#runs/other", "HEAD")
    with pytest.raises(UserError, match=r"not available from DVC .*; check repository, path and revision"):
        resolve(f"dvc:{repository}#runs/policy", "main")
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


def test_the_stage_says_how_to_pin_what_it_fetched(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = hub_cache(policy, tmp_path / "cache", "pi0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    fetch.run(experiment(tmp_path, checkpoint="someone/pi0"))
    line = f"is now commit {commit}; to get the same again, set"
    assert capsys.readouterr().out == f"someone/pi0: the default branch {line} fetch.revision: {commit}\n"
    origin = json.loads((tmp_path / "sft/policy" / ORIGIN).read_text())
    assert (origin["location"], origin["revision"], origin["commit"]) == ("someone/pi0", None, commit)
    fetch.run(experiment(tmp_path, checkpoint="someone/pi0@main"))
    assert capsys.readouterr().out.endswith(f"revision main {line} fetch.checkpoint: someone/pi0@{commit}\n")
    fetch.run(experiment(tmp_path, checkpoint="someone/pi0", revision=commit))
    assert capsys.readouterr().out == ""


RESOLVE_EACH = """
import sys
from pi0rl.errors import UserError
from pi0rl.policy.sources import print_if_moving, resolve
for source in sys.argv[1:]:
    try:
        found = resolve(source, default_branch=True)
        print_if_moving(found, "PIN")
        print(found.commit)
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
    sources = [f"someone/{name}" for name in (f"pi0@{commit}", "pi0@main", "pi0", "damaged@main", "else@main", "else")]
    command = [sys.executable, "-c", RESOLVE_EACH, *sources]
    said = subprocess.run(command, env=settings, capture_output=True, text=True, check=True).stdout
    pinned, *named, damaged, missing, unnamed = said.splitlines()
    assert pinned == commit
    told = f"is now commit {commit}; to get the same again, set PIN"
    assert named == [f"someone/pi0: revision main {told}", commit, f"someone/pi0: the default branch {told}", commit]
    assert "which the hub gives for it; the download is damaged, delete" in damaged
    assert "not in the hub's local cache" in missing
    assert "hf download someone/else --revision main --local-dir DIR" in missing
    assert "hf download someone/else --local-dir DIR" in unnamed
