"""Actors that make one update together (data parallel): gradients are summed, so that all take the same step."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import closing
from datetime import timedelta
from itertools import chain, zip_longest
from typing import Any

import ray
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

# One micro batch of the slowest; the first one compiles kernels.
TEAM_SECONDS = 1800.0


def meeting_place() -> str:
    """An address on this node at which a team may meet."""
    host = ray.util.get_node_ip_address()
    with closing(socket.create_server((host, 0))) as server:
        return f"tcp://{host}:{server.getsockname()[1]}"


class ProcessTeam:
    """This process as one of ``size`` that meet at ``address`` (tcp://host:port); see :class:`pi0rl.rl.update.Team`.

    Gradients travel by NCCL between GPUs and by gloo between cores. Sums are the same to the bit in every process.
    ``in_step``: the weights are spread, see :mod:`pi0rl.cluster.sharding`; their gradients are summed as they arise.
    """

    def __init__(
        self, address: str, rank: int, size: int, in_step: bool = False, seconds: float = TEAM_SECONDS
    ) -> None:
        self.rank, self.size, self.in_step = rank, size, in_step
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, address, timedelta(seconds=seconds), world_size=size, rank=rank)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Every gradient becomes its sum over the team; it stays None where no process has one."""
        parameters = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
        if not parameters:
            return
        device = parameters[0].device
        present = torch.tensor(
            [parameter.grad is not None for parameter in parameters], dtype=torch.int32, device=device
        )
        dist.all_reduce(present, dist.ReduceOp.MAX)
        summed = [parameter for parameter, some in zip(parameters, present.tolist(), strict=True) if some]
        for dtype in dict.fromkeys(parameter.dtype for parameter in summed):
            group = [parameter for parameter in summed if parameter.dtype == dtype]
            flat = torch.cat([_gradient(parameter).reshape(-1) for parameter in group])
            dist.all_reduce(flat)
            parts = flat.split([parameter.numel() for parameter in group])
            for parameter, part in zip(group, parts, strict=True):
                parameter.grad = part.view_as(parameter)

    def gather(self, shares: Sequence[Any]) -> list[Any]:
        """Everybody's ``shares``, which were dealt out one by one, put back into their order."""
        everybody: list[list[Any]] = [[] for _ in range(self.size)]
        dist.all_gather_object(everybody, list(shares))
        dealt = zip_longest(*everybody, fillvalue=_NOTHING)
        return [share for share in chain.from_iterable(dealt) if not isinstance(share, _Nothing)]


class _Nothing:
    """Where a process has had one share less than another."""


_NOTHING = _Nothing()


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
