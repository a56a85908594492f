"""Files and folders that are either whole or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_directory(target: Path) -> Iterator[Path]:
    """A new empty folder that takes the place of ``target`` when the block succeeds, and vanishes when it fails."""
    temporary, old = (target.with_name(f".{target.name}.{state}") for state in ("partial", "old"))
    if old.exists() and not target.exists():
        old.rename(target)  # killed between the two renames below
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _flush(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    _flush_one(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def replace_text(target: Path, text: str) -> None:
    """Write ``text`` under a temporary name, flush it, rename it."""
    temporary = target.with_name(f".{target.name}.partial")
    temporary.write_text(text)
    _flush_one(temporary)
    temporary.replace(target)


def _flush(directory: Path) -> None:
    for path in directory.rglob("*"):
        _flush_one(path)


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
