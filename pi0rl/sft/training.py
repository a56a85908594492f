"""A policy in training with what is measured and saved of it: in this process, or in several that share every batch."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import ray
import torch
from torch import Tensor

from pi0rl.cluster.reservation import Reservation
from pi0rl.cluster.team import ProcessTeam, meeting_place
from pi0rl.cluster.waiting import UPDATE_SECONDS, fetch, fetch_all
from pi0rl.policy.checkpoints import save_policy
from pi0rl.policy.policy import Policy
from pi0rl.policy.precision import set_precision
from pi0rl.policy.weights import policy_tensors
from pi0rl.rl.update import Team
from pi0rl.sft.demonstrations import Demonstrations
from pi0rl.sft.imitation import Imitation, ImitationStep

Row = dict[str, float]
Precision = Literal["fp32", "bf16"]


class Training:
    """Imitation in this process. What is measured and saved has the moving average of the weights, if one is kept."""

    def __init__(self, policy: Policy, imitation: Imitation, held_out: Demonstrations) -> None:
        self._policy, self._imitation, self._held_out = policy, imitation, held_out

    @property
    def done(self) -> int:
        """Optimiser steps so far."""
        return self._imitation.done

    def step(self) -> ImitationStep:
        """One optimiser step."""
        return self._imitation.step()

    def validation_loss(self) -> float:
        """Mean loss on the demonstrations that were held out."""
        with self._imitation.averaged():
            return self._imitation.validation_loss(self._held_out)

    def weights(self) -> dict[str, Tensor]:
        """A copy of all weights, on the CPU."""
        with self._imitation.averaged():
            return {name: tensor.detach().to("cpu", copy=True) for name, tensor in policy_tensors(self._policy).items()}

    def save(self, directory: Path, precision: Precision | None = None) -> None:
        """Write the policy; with ``precision`` it is over: its weights stay in that."""
        with self._imitation.averaged():
            if precision is not None:
                set_precision(self._policy, precision)
            save_policy(self._policy, directory)

    def save_state(self, path: Path, kind: str, rows: list[Row]) -> None:
        """Write everything needed to go on to the same bytes.

        Args:
            path: the file, which appears complete or not at all.
            kind: what a training has to agree in to go on from it.
            rows: the curve so far.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_suffix(".writing.partial")
        torch.save({"kind": kind, "rows": rows, "training": self._imitation.state()}, written)
        written.replace(path)

    def go_on(self, path: Path, kind: str) -> list[Row]:
        """The curve so far of a training of the same kind that was stopped, whose state is taken over; else empty."""
        if not path.is_file():
            return []
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if saved["kind"] != kind:
            return []
        self._imitation.restore(saved["training"])
        return saved["rows"]


Begin = Callable[[str, Team], Training]
"""Device, as torch calls it, and team -> training from its start."""


class TrainingWorker:
    """A Ray actor: one of the processes of a :class:`SharedTraining`."""

    def __init__(self, begin: Begin, device: str) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._begin, self._device = begin, device

    def meeting_place(self) -> str:
        return meeting_place()

    def start(self, address: str, rank: int, size: int) -> None:
        """Meet the others and begin. Not done when the actor is created: Ray would hide why it failed."""
        self._training = self._begin(self._device, ProcessTeam(address, rank, size))

    def call(self, method: str, *arguments: Any) -> Any:
        """A method of the training."""
        return getattr(self._training, method)(*arguments)


class SharedTraining:
    """Imitation in several processes that share every batch and make the same steps; used as :class:`Training`.

    Args:
        begin: begins the training in every process, all alike.
        room: reserved for them, one per seat of the actor.

    Raises:
        UserError: as ``begin`` does.
    """

    def __init__(self, begin: Begin, room: Reservation) -> None:
        self.done = 0
        worker, placement = ray.remote(TrainingWorker), room.placement
        # The GPU is reserved with the room; those that play to measure success take turns on it.
        self._workers = [
            worker.options(**room.seat_options(seat) | {"num_gpus": 0}).remote(begin, placement.device(seat))
            for seat in placement.seats("actor")
        ]
        address = fetch(self._workers[0].meeting_place.remote(), "an address for the training processes")
        started = [w.start.remote(address, rank, len(self._workers)) for rank, w in enumerate(self._workers)]
        fetch_all(started, f"the {len(self._workers)} training processes to begin and to meet at {address}")

    def step(self) -> ImitationStep:
        step = self._all("step")
        self.done = step.step
        return step

    def validation_loss(self) -> float:
        return self._first("validation_loss")

    def weights(self) -> dict[str, Tensor]:
        return self._first("weights")

    def save(self, directory: Path, precision: Precision | None = None) -> None:
        self._first("save", directory, precision)

    def save_state(self, path: Path, kind: str, rows: list[Row]) -> None:
        self._first("save_state", path, kind, rows)

    def go_on(self, path: Path, kind: str) -> list[Row]:
        rows = self._all("go_on", path, kind)
        self.done = len(rows)
        return rows

    def _all(self, method: str, *arguments: Any) -> Any:
        calls = [worker.call.remote(method, *arguments) for worker in self._workers]
        return fetch_all(calls, f"the training processes' {method}", UPDATE_SECONDS)[0]

    def _first(self, method: str, *arguments: Any) -> Any:
        """All have the same weights: the first one's are everybody's."""
        return fetch(self._workers[0].call.remote(method, *arguments), f"the training's {method}", UPDATE_SECONDS)
