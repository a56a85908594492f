"""``timing.json`` in a stage's folder: the invocations that the stage took, each with its machine and its code.

A stage that was interrupted or killed goes on in another invocation, maybe elsewhere. Until it is done, what it took so
far stands beside its folder, written every few seconds. DVC ignores the file: times differ where outputs do not.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pi0rl.files import replace_text
from pi0rl.machine import Machine, this_machine
from pi0rl.provenance import Commit, commit, versions

FILE = "timing.json"
# A kill loses no more than this.
BEAT_SECONDS = 10.0


@dataclass(frozen=True)
class Invocation:
    """One invocation of a stage.

    Attributes:
        started: ISO 8601 time.
        seconds: wall time.
        machine, commit, versions: where it ran and with what; None and empty where an earlier version recorded neither.
    """

    started: str
    seconds: float
    machine: Machine | None = None
    commit: Commit | None = None
    versions: dict[str, str] | None = None


@contextmanager
def recorded(folder: Path, origin: str, repository: Path) -> Iterator[None]:
    """Record the block as an invocation of the stage that writes ``folder``, in ``folder/timing.json`` when it is done.

    A folder that then has its record was not made in the block: the stage found it finished, and the record stays.

    Args:
        folder: the stage's; it is there when the block is done.
        origin: names what the stage is made from. Earlier invocations count only if they were of the same.
        repository: where the code is.
    """
    unfinished = folder.with_name(f".{folder.name}.timing.partial")
    before = _unfinished(unfinished, origin)
    begun = Invocation(
        datetime.now(UTC).isoformat(timespec="seconds"), 0.0, this_machine(), commit(repository), versions()
    )
    clock, done = time.monotonic(), threading.Event()

    def so_far() -> list[Invocation]:
        return [*before, replace(begun, seconds=round(time.monotonic() - clock, 1))]

    def save() -> None:
        with suppress(OSError):  # of a full disk, the stage itself has to tell
            _write(unfinished, {"origin": origin, "invocations": [asdict(each) for each in so_far()]})

    def beat() -> None:
        while not done.wait(BEAT_SECONDS):
            save()

    save()
    beating = threading.Thread(target=beat, daemon=True)
    beating.start()
    try:
        yield
    finally:
        done.set()
        beating.join()
        save()
    if not (folder / FILE).exists():
        _write(folder / FILE, [asdict(each) for each in so_far()])
    unfinished.unlink(missing_ok=True)


def read_invocations(folder: Path) -> tuple[Invocation, ...]:
    """What the finished stage in ``folder`` took, in order; nothing where it is not recorded."""
    path = folder / FILE
    if not path.is_file():
        return ()
    content = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(content, dict):  # of an earlier version: the last invocation's times
        content = [content]
    return tuple(_invocation(entry) for entry in content)


def _unfinished(path: Path, origin: str) -> Sequence[Invocation]:
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return [_invocation(entry) for entry in content["invocations"]] if content.get("origin") == origin else []


def _invocation(entry: dict[str, Any]) -> Invocation:
    machine, code = entry.get("machine"), entry.get("commit")
    return Invocation(
        started=entry["started"],
        seconds=float(entry["seconds"]),
        machine=machine and Machine(**{**machine, "gpus": tuple(machine["gpus"])}),
        commit=code and Commit(**code),
        versions=entry.get("versions"),
    )


def _write(path: Path, content: Any) -> None:
    replace_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
