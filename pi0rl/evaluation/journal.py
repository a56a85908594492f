"""The journal of an evaluation: a line per finished episode, so that a killed evaluation goes on where it was."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from pi0rl.evaluation.table import Row
from pi0rl.files import replace_text

Key = tuple[str, str, int, int]
_NAME = "episodes.jsonl"


def holds_others(folder: Path, identity: str) -> bool:
    """Whether a journal in ``folder`` has episodes of another evaluation, which a ``Journal`` of this one drops."""
    lines = _lines(folder / _NAME)
    return len(lines) > 2 and lines[0] != _header(identity)  # the header, a row, and what follows the last newline


class Journal:
    """Finished episodes in ``folder/episodes.jsonl``; videos lie beside it under the paths their rows name.

    An episode that ended in an error is remembered but not written down, so the next attempt plays it again.

    Attributes:
        folder: made if missing; emptied if it belongs to another evaluation.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        """``identity`` names everything that decides an outcome; only rows written under the same one are kept."""
        self.folder = folder
        self._file = folder / _NAME
        self._rows: dict[Key, Row] = {}
        header, lines = _header(identity), _lines(self._file)
        if lines[:1] != [header]:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            lines = [header, ""]
        whole = lines[:-1]  # what follows the last newline was cut off by a kill
        for line in whole[1:]:
            self._keep(json.loads(line))
        replace_text(self._file, "".join(f"{line}\n" for line in whole))

    def add(self, row: Row) -> None:
        """Keep the row, in place of an earlier one of the same episode."""
        self._keep(row)
        if row["error"]:
            return
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def rows(self, policy: str) -> list[Row]:
        """The policy's episodes so far, in no particular order."""
        return [row for key, row in self._rows.items() if key[0] == policy]

    def remove(self) -> None:
        """The evaluation is complete."""
        shutil.rmtree(self.folder)

    def _keep(self, row: Row) -> None:
        self._rows[row["policy"], row["split"], row["seed"], row["index"]] = row


def _header(identity: str) -> str:
    return json.dumps({"evaluation": identity})


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").split("\n") if file.is_file() else []
