"""How many points of a sweep run at a time: as many as have cores, main memory and GPUs of their own.

A point's placement numbers GPUs from 0, and the stages of each point see only the GPUs that it was given
(``CUDA_VISIBLE_DEVICES``). So eight points with ``rollout,actor: 0`` fill a machine with eight GPUs.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from shutil import which

import psutil

from pi0rl.cluster.placement import resolve_placement
from pi0rl.experiment import Experiment
from pi0rl.sweeps import workers_of

_GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """What there is: cores, main memory in GiB, and GPUs by the names that ``CUDA_VISIBLE_DEVICES`` takes."""

    cores: int
    memory: float
    gpus: tuple[str, ...]


class Gpus:
    """GPUs that points hold while they run, and then hand on."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._free = list(names)
        self._changed = threading.Condition()

    @contextmanager
    def take(self, count: int) -> Iterator[dict[str, str]]:
        """Hold ``count`` of them, waiting until as many are free; gives the variables that hide the others."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._free) >= count)
            mine, self._free = self._free[:count], self._free[count:]
        try:
            nothing_to_hide = len(mine) in (0, len(self._names))
            yield {} if nothing_to_hide else {"CUDA_VISIBLE_DEVICES": ",".join(mine)}
        finally:
            with self._changed:
                self._free = sorted([*self._free, *mine], key=self._names.index)
                self._changed.notify_all()


def this_machine() -> Machine:
    """The one that the flow runs on."""
    return Machine(os.cpu_count() or 1, psutil.virtual_memory().total / _GIB, _visible_gpus())


def gpus_of(experiment: Experiment, machine: Machine) -> int:
    """How many of the machine's GPUs a point needs, counted from 0 up to the highest that it names.

    Raises:
        UserError: it names one that is not there.
    """
    if _elsewhere(experiment):
        return 0
    return max((gpu + 1 for gpu in resolve_placement(experiment.params.cluster, (len(machine.gpus),)).gpus), default=0)


def points_that_fit(points: Sequence[Experiment], machine: Machine) -> int:
    """How many of ``points`` have a core for each worker, main memory as planned, and their GPUs; at least one.

    On a running Ray cluster it is one: that cluster's machines are not this one's to share out.
    """
    if any(_elsewhere(point) for point in points):
        return 1
    fit = machine.cores // max(workers_of(point) for point in points)
    if gpus := max(gpus_of(point, machine) for point in points):
        fit = min(fit, len(machine.gpus) // gpus)
    if fit > 1:
        fit = min(fit, int(machine.memory / max(_memory(point, machine) for point in points)))
    return max(1, fit)


def _elsewhere(experiment: Experiment) -> bool:
    cluster = experiment.params.cluster
    return cluster.address is not None or cluster.num_nodes > 1


def _memory(experiment: Experiment, machine: Machine) -> float:
    """GiB of main memory that a training is planned to take."""
    from pi0rl.plan import MAIN, USUAL_GPU_GIB, make_plan  # brings torch, which a flow needs for nothing else

    plan = make_plan(experiment.params, len(machine.gpus), USUAL_GPU_GIB, machine.memory)
    return plan.total(MAIN) / _GIB


def _visible_gpus() -> tuple[str, ...]:
    """What ``CUDA_VISIBLE_DEVICES`` names, or else what the driver lists."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None and which("nvidia-smi") is not None:
        command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True)
        named = done.stdout.replace("\n", ",") if done.returncode == 0 else ""
    return tuple(name.strip() for name in (named or "").split(",") if name.strip())
