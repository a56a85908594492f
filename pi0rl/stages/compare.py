"""``pi0rl compare``: evaluations of several checkpoints under one protocol, side by side and paired by episode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from pi0rl.errors import UserError
from pi0rl.evaluation.completeness import require_complete
from pi0rl.evaluation.protocols import Protocol, SuiteRule
from pi0rl.evaluation.table import read_episode_table
from pi0rl.files import read_json
from pi0rl.report.tables import comparison_lines, result_lines, summarise


@dataclass(frozen=True)
class Evaluation:
    """What ``pi0rl evaluate --checkpoint`` left in a folder: how it was examined, and its episode table."""

    folder: Path
    protocol: Protocol
    exam: dict[str, list[str] | list[int]]
    episodes: pd.DataFrame


def run(folders: Sequence[Path]) -> None:
    """Print the success of every checkpoint, and every later one against the first on the same episodes.

    Raises:
        UserError: a folder holds no evaluation, or the evaluations are not of one protocol and the same episodes.
    """
    evaluations = [read_evaluation(folder) for folder in folders]
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    first = evaluations[0]
    for other in evaluations[1:]:
        _require_same_exam(first, other)
    tables = [each.episodes.assign(policy=name) for each, name in zip(evaluations, names, strict=True)]
    together = pd.concat(tables, ignore_index=True)
    planned = Counter(zip(first.episodes["split"].tolist(), first.episodes["seed"].tolist(), strict=True))
    require_complete(together, planned, "evaluations")
    summary = summarise(together, tuple(names))
    print("\n".join([*result_lines(summary, first.protocol), "", *comparison_lines(summary)]))


def read_evaluation(folder: Path) -> Evaluation:
    """The evaluation in a folder.

    Raises:
        UserError: there is none, it is damaged, or other code has written it.
    """
    for name in ("evaluation.json", "episodes.parquet"):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder}: no {name}, expected a folder that `pi0rl evaluate --checkpoint ...` has written"
            )
    described = read_json(folder / "evaluation.json", ("protocol", "suites", "splits", "seeds"))
    try:
        values = dict(described["protocol"])
        recorded = values.pop("hash")
        protocol = Protocol(**{**values, "rules": tuple(SuiteRule(**rule) for rule in values["rules"])})
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{folder}/evaluation.json: not this version's protocol ({error}); evaluate again") from error
    if protocol.hash != recorded:
        raise UserError(f"{folder}/evaluation.json: its protocol is {protocol.hash}, not {recorded}; evaluate again")
    exam = {key: described[key] for key in ("suites", "splits", "seeds")}
    return Evaluation(folder, protocol, exam, read_episode_table(folder / "episodes.parquet"))


def _require_same_exam(first: Evaluation, other: Evaluation) -> None:
    if first.protocol.hash != other.protocol.hash:
        raise UserError(
            f"{other.folder}: protocol {other.protocol.name} ({other.protocol.hash}), expected that of {first.folder}, "
            f"{first.protocol.name} ({first.protocol.hash}); different exams share no table"
        )
    for key, value in first.exam.items():
        if other.exam[key] != value:
            raise UserError(f"{other.folder}: {key} {other.exam[key]}, expected those of {first.folder}, {value}")
