"""Files and folders that are either whole or not there, and JSON files that say what is wrong with them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pi0rl.errors import UserError


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


def read_json(path: Path, keys: Iterable[str] = ()) -> dict[str, Any]:
    """The JSON object in a file, which has at least ``keys``.

    Raises:
        UserError: it is not there, not readable, no object, or lacks a key.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: not found; expected a folder with this file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); copy, download or make it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}")
    if absent := [key for key in keys if key not in content]:
        raise UserError(f"{path}: no {absent[0]!r}, expected {', '.join(keys)}; make it again with this version")
    return content


def _flush(directory: Path) -> None:
    for path in directory.rglob("*"):
        _flush_one(path)


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
