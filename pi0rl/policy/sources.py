"""Where a checkpoint comes from: a directory, a hub id with revision, an MLflow model, or a DVC remote."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pi0rl.errors import UserError, first_line
from pi0rl.files import replace_directory
from pi0rl.policy.weights import read_json, sha256

ORIGIN = "origin.json"
Kind = Literal["directory", "hub", "mlflow", "dvc"]
_HUB = re.compile(r"(\w[\w.-]*/[\w.-]+)(?:@(.*))?")
_REVISION = re.compile(r"[\w./-]+")
_MLFLOW = ("models:/", "runs:/", "mlflow-artifacts:/")
_DVC = "dvc:"
_PATTERNS = ("*.json", "*.safetensors", "*.model", "*full_weights.pt")
_HEX64 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Source:
    """A checkpoint's files on this machine, and where they are from.

    Attributes:
        directory: where they are.
        kind, location: how they were found, and under what name.
        revision: the one asked for, None for the default; commit: the one it stood for, None where the source has no
            commits or it is the files as they lie in a DVC repository's folder.
    """

    directory: Path
    kind: Kind
    location: str
    revision: str | None = None
    commit: str | None = None


def origin_of(source: Source, layout: str) -> dict[str, Any]:
    """What is recorded beside a fetched or converted policy: where it is from, and digests of the files it was."""
    files = sorted({f for pattern in _PATTERNS for f in source.directory.rglob(pattern) if f.name != ORIGIN})
    before = source.directory / ORIGIN
    return {
        "kind": source.kind,
        "location": source.location,
        "revision": source.revision,
        "commit": source.commit,
        "layout": layout,
        "sha256": {str(file.relative_to(source.directory)): sha256(file) for file in files},
        "before": read_json(before) if before.is_file() else None,
    }


def resolve(source: str, revision: str | None = None, default_branch: bool = False) -> Source:
    """The files of ``source``, downloaded if need be.

    Args:
        source: a directory; ``org/name@revision`` on the hub; an MLflow URI (``models:/name/3``, ``runs:/id/path``);
            ``dvc:REPOSITORY#PATH`` (the repository a folder or git URL).
        revision: of a hub id, instead of one after ``@``, or of a DVC repository; left out, the files as they lie in
            its folder, or a git URL's default branch.
        default_branch: whether a hub id may do without revision: for those who record the commit.

    Raises:
        UserError: it is not there, or not reachable; says what is missing and where to put it. Two revisions, or one of
            what has none.
    """
    if source.startswith(_DVC):
        return _from_dvc(source, revision)
    mlflow = source.startswith(_MLFLOW)
    if mlflow or Path(source).is_dir():
        if revision is not None:
            raise UserError(
                f"{source}: revision {revision} is given, but a folder or MLflow URI has none; leave the revision out"
            )
        return _from_mlflow(source) if mlflow else Source(Path(source), "directory", source)
    match = _HUB.fullmatch(source)
    if match is None or (revision is None and match[2] is None and not default_branch):
        raise UserError(
            f"{source}: no such checkpoint directory; expected a directory, a hub id org/name@revision, an MLflow URI "
            "models:/name/version or dvc:REPOSITORY#PATH"
        )
    if revision is not None and match[2] not in (None, revision):
        raise UserError(
            f"{source}: revision {match[2]} in the name, but revision {revision} is given too; leave one of them out"
        )
    return _from_hub(match[1], match[2] if revision is None else revision)


def print_if_moving(source: Source, pin: str) -> None:
    """A line where a branch or tag was asked for: the commit it stood for, and ``pin``, which asks for that one."""
    if source.commit is not None and source.commit != source.revision:
        asked = "the default branch" if source.revision is None else f"revision {source.revision}"
        print(f"{source.location}: {asked} is now commit {source.commit}; to get the same again, set {pin}", flush=True)


def verify_hub_files(directory: Path) -> None:
    """Compare large files with the digest the hub names them by (its cache keeps them under it)."""
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        expected = file.resolve().name
        if _HEX64.fullmatch(expected) and sha256(file) != expected:
            raise UserError(
                f"{file}: sha256 is not {expected[:12]}..., which the hub gives for it; the download is damaged, "
                f"delete {file.resolve()} and fetch again"
            )


def names_hub_revision(source: str) -> bool:
    """Whether it is of the form ``org/name@revision``; a folder's name might be as well."""
    match = _HUB.fullmatch(source)
    return match is not None and match[2] is not None


def hub_dataset(source: str) -> Path:
    """The files of a data set ``org/name@revision`` on the hub, downloaded if need be.

    Raises:
        UserError: no hub id, not there, or not reachable; says what is missing and where to put it.
    """
    if not names_hub_revision(source):
        raise UserError(f"{source}: no such folder; expected one, or a hub id org/name@revision of a data set")
    name, _, revision = source.partition("@")
    return _snapshot(name, revision, "dataset", None)


def _from_hub(name: str, revision: str | None) -> Source:
    directory = _snapshot(name, revision, "model", list(_PATTERNS))
    return Source(directory, "hub", name, revision, commit=directory.name)


def _snapshot(name: str, revision: str | None, kind: Literal["model", "dataset"], patterns: list[str] | None) -> Path:
    """The hub's files at ``revision``, the default branch where that is None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    asked = name if revision is None else f"{name}@{revision}"
    if revision is not None and not _REVISION.fullmatch(revision):
        raise UserError(
            f"{asked}: revision {revision!r}, expected a branch, tag or commit (a word of letters, digits, . _ - /)"
        )
    try:
        directory = Path(snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise UserError(
            f"{asked}: no such folder and not a hub id ({first_line(error)}); expected a folder that is there, or "
            "org/name@revision"
        ) from error
    except GatedRepoError as error:
        raise UserError(f"{asked}: gated on the hub; accept its terms there and set HF_TOKEN") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        options = " --repo-type dataset" if kind == "dataset" else ""
        options += "" if revision is None else f" --revision {revision}"
        raise UserError(
            f"{asked}: no such folder, not in the hub's local cache and not available from the hub "
            f"({first_line(error)}); check id and revision, or where there is a network run 'hf download "
            f"{name}{options} --local-dir DIR', copy DIR here and name it instead"
        ) from error
    verify_hub_files(directory)
    return directory


def _from_mlflow(uri: str) -> Source:
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    try:
        downloaded = Path(download_artifacts(artifact_uri=uri))
    except (MlflowException, OSError) as error:
        raise UserError(
            f"{uri}: not available from MLflow ({first_line(error)}); set MLFLOW_TRACKING_URI, or copy the model's "
            "folder here and name that"
        ) from error
    return Source(_only_checkpoint(downloaded, uri), "mlflow", uri)


def _from_dvc(source: str, revision: str | None) -> Source:
    from dvc.exceptions import DvcException
    from dvc.scm import SCMError

    repository, separator, path = source.removeprefix(_DVC).partition("#")
    if not separator or not path:
        raise UserError(f"{source}: expected dvc:REPOSITORY#PATH, e.g. dvc:.#runs/quickstart/train/policy")
    try:
        directory, commit = _dvc_download(repository, path, revision)
    except (DvcException, SCMError, OSError) as error:
        raise UserError(
            f"{source}: not available from DVC ({first_line(error)}); check repository, path and revision, or run "
            "dvc pull in it and name the folder"
        ) from error
    return Source(_only_checkpoint(directory, source), "dvc", source, revision, commit)


def _dvc_download(repository: str, path: str, revision: str | None) -> tuple[Path, str | None]:
    """Fetch ``path`` into the user's cache, under its repository and commit.

    Without revision, a folder's files are what they are now: no commit need hold them.
    """
    from dvc.api import DVCFileSystem
    from dvc.fs import GitFileSystem

    files = DVCFileSystem(url=repository, rev=revision)
    commit = files.repo.get_rev() if isinstance(files.repo.fs, GitFileSystem) else None
    place = re.sub(r"[^\w.-]+", "-", f"{repository}-{commit or 'workspace'}-{path}").strip("-")
    target = Path.home() / ".cache/pi0rl/dvc" / place
    with replace_directory(target) as temporary:
        files.get(path, str(temporary / "checkpoint"), recursive=True)
    return target / "checkpoint", commit


def _only_checkpoint(directory: Path, source: str) -> Path:
    """The one folder below ``directory`` with a checkpoint's config.json or weights; MLflow nests artifacts."""
    if not directory.is_dir():
        raise UserError(f"{source}: a single file, expected a checkpoint's folder; name the folder above it")
    found = sorted({f.parent for p in ("*.safetensors", "full_weights.pt") for f in directory.rglob(p)})
    if directory in found or not found:
        return directory
    top = found[0]
    if any(top not in (folder, *folder.parents) for folder in found):
        names = ", ".join(str(folder.relative_to(directory)) for folder in found[:3])
        raise UserError(f"{source}: several checkpoints ({names}); name one of them")
    return top
