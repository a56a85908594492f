"""``pi0rl evaluate --checkpoint``: any checkpoint on any suites under a named protocol, outside an experiment."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pi0rl import provenance
from pi0rl.cluster.players import PlayersConfig
from pi0rl.errors import UserError
from pi0rl.evaluation.completeness import require_complete
from pi0rl.evaluation.evaluator import FAILURES_PER_KIND, SPLITS, Exam, Play, Recording, examine
from pi0rl.evaluation.journal import Journal, holds_others
from pi0rl.evaluation.protocols import protocol_named
from pi0rl.evaluation.table import episode_table, write_episode_table
from pi0rl.files import read_json, replace_directory
from pi0rl.machine import this_machine
from pi0rl.params import ClusterParams
from pi0rl.policy.checkpoints import layout_of
from pi0rl.policy.sampling import SamplerConfig
from pi0rl.policy.sources import Source, origin_of, print_if_moving, resolve
from pi0rl.report.tables import result_lines, summarise
from pi0rl.stages.playing import open_play

# In an evaluation's folder: what was examined, and how.
DESCRIPTION, RESULTS = "evaluation.json", "results.md"
_EXAM = ("suites", "splits", "seeds")
_LONGEST_NAME = 160
_SLOTS_PER_CELL, _STAGES = 8, 2


@dataclass(frozen=True)
class Request:
    """What the command line asks for.

    Attributes:
        checkpoint: a folder (own, openpi, RLinf or LeRobot layout), a hub id ``org/name@revision``, an MLflow URI or
            ``dvc:REPOSITORY#PATH``.
        suites: to play, any of LIBERO's and LIBERO-PRO's.
        protocol, overrides: the exam.
        split: which init states.
        seeds: of the policy's noise; each plays the whole plan.
        output: folder for the table, its summary and videos; None: one named after the checkpoint and the exam.
        workers: simulator processes.
        failure_videos: failures to record per kind.
    """

    checkpoint: str
    suites: tuple[str, ...]
    protocol: str
    overrides: tuple[str, ...]
    split: Literal["official", "held_out", "both"]
    seeds: tuple[int, ...]
    output: Path | None
    workers: int
    failure_videos: int = FAILURES_PER_KIND


def run(request: Request) -> None:
    """Play what is missing, write ``episodes.parquet``, ``evaluation.json``, ``results.md`` and videos, print results.

    An evaluation that is there already is printed and not played again; what another one has left is refused.

    Raises:
        UserError: a bad protocol, suite or checkpoint, an output folder that is something else or holds another
            evaluation, or a table from which no conclusion may be drawn.
    """
    protocol = protocol_named(request.protocol, request.overrides)
    exam = Exam(protocol, request.suites, SPLITS[request.split], request.seeds)
    planned = exam.planned()  # refuses unknown suites and missing init states
    output = request.output or default_output(request)
    if output.exists() and not (output / DESCRIPTION).is_file():
        raise UserError(f"--output {output}: exists and holds no evaluation, expected a new folder; choose another")
    source = resolve(request.checkpoint)
    if source.kind == "hub":
        print_if_moving(source, f"--checkpoint {source.location}@{source.commit}")
    described = _described(source, exam)
    if output.exists():
        _require_same(output, described)
        print(f"{(output / RESULTS).read_text(encoding='utf-8')}\nPlayed before: {output}. Delete it to play it again.")
        return
    policy, journal = "policy", _journal(output, described)

    @contextmanager
    def play_with(replan_steps: int) -> Iterator[Play]:
        slots = request.workers * _STAGES * _SLOTS_PER_CELL
        sampler = SamplerConfig("flow_ode", protocol.denoising_steps, replan_steps)
        config = PlayersConfig(exam.slot(), request.workers, slots, _STAGES, sampler)
        with open_play(_cluster(), config, source.directory) as play:
            yield play

    examine(exam, policy, play_with, journal, Recording(failures_per_kind=request.failure_videos))
    table = episode_table(journal.rows(policy), (policy,))
    require_complete(table, planned, str(output))
    results = result_lines(summarise(table), protocol)
    with replace_directory(output) as folder:
        write_episode_table(table, folder / "episodes.parquet")
        made_with = {"commit": str(provenance.commit(Path(__file__).parents[2])), "machine": asdict(this_machine())}
        (folder / DESCRIPTION).write_text(json.dumps(described | made_with, indent=2) + "\n")
        (folder / RESULTS).write_text("\n".join(results) + "\n")
        if (journal.folder / "videos").is_dir():
            shutil.copytree(journal.folder / "videos", folder / "videos")
    journal.remove()
    print("\n".join([*results, "", f"Written to {output}."]))


def default_output(request: Request) -> Path:
    """``runs/evaluations/<checkpoint>-<exam>``, all of the exam, so that another one has another folder."""
    folder = Path(request.checkpoint)
    place = folder.resolve().parts[1:]
    checkpoint = place[-3:-1] if place[-1:] == ("policy",) else place[-2:]  # runs/NAME/sft/policy is NAME-sft
    suites = (suite.removeprefix("libero_") for suite in request.suites)
    exam = (request.protocol, *request.overrides, *suites, request.split, *map(str, request.seeds))
    name = "-".join((*(checkpoint if folder.is_dir() else (request.checkpoint,)), *exam))
    name = re.sub(r"[^\w.+-]+", "-", name).strip("-.")
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return Path("runs", "evaluations", name)


def default_workers() -> int:
    """As many as there are cores, up to 16."""
    return min(os.cpu_count() or 1, 16)


def _described(source: Source, exam: Exam) -> dict[str, Any]:
    """The content of ``evaluation.json``."""
    return {
        "checkpoint": origin_of(source, layout_of(source.directory)),
        "protocol": asdict(exam.protocol) | {"hash": exam.protocol.hash},
        "suites": list(exam.suites),
        "splits": list(exam.splits),
        "seeds": list(exam.seeds),
        "versions": provenance.versions(),
    }


def _identity(described: Mapping[str, Any]) -> dict[str, Any]:
    """What makes an evaluation that one: the checkpoint's bytes, wherever they came from, and the exam."""
    checkpoint, protocol = described["checkpoint"].get("sha256"), described["protocol"].get("hash")
    return {"checkpoint": checkpoint, "protocol": protocol} | {key: described[key] for key in _EXAM}


def _require_same(output: Path, described: Mapping[str, Any]) -> None:
    wanted = _identity(described)
    there = _identity(read_json(output / DESCRIPTION, ("checkpoint", "protocol", *_EXAM)))
    if other := [key for key in wanted if there[key] != wanted[key]]:
        raise UserError(
            f"--output {output}: holds an evaluation that differs in {', '.join(other)}, expected a new folder; choose "
            "another, or delete it"
        )


def _journal(output: Path, described: Mapping[str, Any]) -> Journal:
    """What is done so far of this evaluation; with other versions it would be another one, half by half."""
    folder = output.parent / f".{output.name}.parts"
    identity = json.dumps(_identity(described) | {"versions": described["versions"]}, sort_keys=True)
    if holds_others(folder, identity):
        raise UserError(
            f"{folder}: an unfinished evaluation of another checkpoint or exam, or with other versions of packages; "
            "delete it, or choose another --output"
        )
    return Journal(folder, identity)


def _cluster() -> ClusterParams:
    """The policy on every GPU of this machine, or on the CPU without one."""
    import torch

    device = "all" if torch.cuda.is_available() else "cpu"
    return ClusterParams(component_placement={"env": "cpu", "rollout": device, "actor": "cpu"})


def words(text: str) -> tuple[str, ...]:
    """``a,b`` -> ('a', 'b')."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def whole_numbers(text: str, option: str) -> tuple[int, ...]:
    """``0,1,2`` -> (0, 1, 2); raises UserError that names ``option``."""
    parts = words(text)
    if not parts or not all(part.isdigit() for part in parts) or len(set(parts)) < len(parts):
        raise UserError(f"{option} {text}: expected different whole numbers, for example {option} 0,1,2")
    return tuple(map(int, parts))
