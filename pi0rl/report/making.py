"""With what a run was made: code, versions and machine, as its stages recorded them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pi0rl.report.inputs import StageRecord


@dataclass(frozen=True)
class Making:
    """Stages that were made alike.

    Attributes:
        stages: their labels.
        facts: what is known, by name; empty where an earlier version recorded nothing.
        commit: of the code, with nothing uncommitted; empty where that is not so, or not known.
    """

    stages: tuple[str, ...]
    facts: dict[str, str]
    commit: str


def makings(stages: Sequence[StageRecord]) -> tuple[Making, ...]:
    """The stages by what they were made with; one that was resumed elsewhere is listed under both."""
    found: list[Making] = []
    for stage in stages:
        for invocation in stage.invocations:
            facts = {} if invocation.commit is None else {"commit": str(invocation.commit)}
            if machine := invocation.machine:
                facts |= {"processor": f"{machine.cpu}, {machine.cores} cores", "GPUs": ", ".join(machine.gpus)}
                facts["renderer"] = machine.renderer
            facts = {name: value or "none" for name, value in facts.items()} | (invocation.versions or {})
            clean = "" if invocation.commit is None or invocation.commit.dirty else invocation.commit.hash
            alike = next((each for each in found if each.facts == facts), None)
            if alike is None:
                found.append(Making((stage.label,), facts, clean))
            elif stage.label not in alike.stages:
                found[found.index(alike)] = Making((*alike.stages, stage.label), facts, clean)
    return tuple(found)


def one_commit(made: Sequence[Making]) -> str:
    """The commit that all stages were made at; empty where there is no such one."""
    commits = {each.commit for each in made}
    return commits.pop() if len(commits) == 1 else ""
