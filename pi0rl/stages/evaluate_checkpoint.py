"""``pi0rl evaluate --checkpoint``: any checkpoint on any suites under a named protocol, outside an experiment."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pi0rl import provenance
from pi0rl.cluster.players import PlayersConfig
from pi0rl.errors import UserError
from pi0rl.evaluation.completeness import require_complete
from pi0rl.evaluation.evaluator import FAILURES_PER_KIND, Exam, Play, Recording, examine
from pi0rl.evaluation.journal import Journal
from pi0rl.evaluation.protocols import protocol_named
from pi0rl.evaluation.table import episode_table, write_episode_table
from pi0rl.files import replace_directory
from pi0rl.libero.plan import Split
from pi0rl.machine import this_machine
from pi0rl.params import ClusterParams
from pi0rl.policy.sampling import SamplerConfig
from pi0rl.report.tables import result_lines, summarise
from pi0rl.stages.playing import open_play

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
        output: folder for the table, its summary and videos.
        workers: simulator processes.
        failure_videos: failures to record per kind.
    """

    checkpoint: str
    suites: tuple[str, ...]
    protocol: str
    overrides: tuple[str, ...]
    split: Split
    seeds: tuple[int, ...]
    output: Path
    workers: int
    failure_videos: int = FAILURES_PER_KIND


def run(request: Request) -> None:
    """Play what is missing, write ``episodes.parquet``, ``evaluation.json``, ``results.md`` and videos, print results.

    Raises:
        UserError: a bad protocol, suite or checkpoint, an output folder that is something else, or a table from which
            no conclusion may be drawn.
    """
    exam = Exam(protocol_named(request.protocol, request.overrides), request.suites, (request.split,), request.seeds)
    planned = exam.planned()  # refuses unknown suites and missing init states
    checkpoint = _described(request.checkpoint)
    output = request.output
    if output.exists() and not (output / "evaluation.json").is_file():
        raise UserError(f"--output {output}: exists and holds no evaluation, expected a new folder; choose another")
    policy = "policy"
    described = {
        "checkpoint": checkpoint,
        "protocol": asdict(exam.protocol) | {"hash": exam.protocol.hash},
        "suites": exam.suites,
        "splits": exam.splits,
        "seeds": exam.seeds,
        "versions": provenance.versions(),
    }
    journal = Journal(output.parent / f".{output.name}.parts", json.dumps(described, sort_keys=True))

    @contextmanager
    def play_with(replan_steps: int) -> Iterator[Play]:
        slots = request.workers * _STAGES * _SLOTS_PER_CELL
        sampler = SamplerConfig("flow_ode", exam.protocol.denoising_steps, replan_steps)
        config = PlayersConfig(exam.slot(), request.workers, slots, _STAGES, sampler)
        with open_play(_cluster(), config, Path(request.checkpoint)) as play:
            yield play

    examine(exam, policy, play_with, journal, Recording(failures_per_kind=request.failure_videos))
    table = episode_table(journal.rows(policy), (policy,))
    require_complete(table, planned, str(output))
    results = result_lines(summarise(table), exam.protocol)
    with replace_directory(output) as folder:
        write_episode_table(table, folder / "episodes.parquet")
        made_with = {"commit": str(provenance.commit(Path(__file__).parents[2])), "machine": asdict(this_machine())}
        (folder / "evaluation.json").write_text(json.dumps(described | made_with, indent=2) + "\n")
        (folder / "results.md").write_text("\n".join(results) + "\n")
        if (journal.folder / "videos").is_dir():
            shutil.copytree(journal.folder / "videos", folder / "videos")
    journal.remove()
    print("\n".join([*results, "", f"Written to {output}."]))


def default_output(checkpoint: str, protocol: str, overrides: Sequence[str] = ()) -> Path:
    """``runs/evaluations/<checkpoint>-<protocol>``, and what of the protocol is changed."""
    path = Path(checkpoint)
    name = f"{path.resolve().parents[1].name}-{path.resolve().parent.name}" if path.is_dir() else checkpoint
    return Path("runs", "evaluations", re.sub("[/@=]", "-", "-".join((name, protocol, *overrides))))


def default_workers() -> int:
    """As many as there are cores, up to 16."""
    return min(os.cpu_count() or 1, 16)


def _described(checkpoint: str) -> dict[str, str]:
    """The checkpoint's name and, of a folder, the digest of its files."""
    folder = Path(checkpoint)
    return {"source": checkpoint} | ({"sha256": provenance.folder_hash(folder)} if folder.is_dir() else {})


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
