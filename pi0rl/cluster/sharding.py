"""Weights spread over the actors (FSDP2), for policies of which everything is trained.

In an update every actor keeps a part of the weights, of their gradients and of AdamW's moments, and puts a layer's
weights together where it computes. While episodes are played everybody has them whole: actors do not act in step.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pi0rl.policy.policy import Policy


class Shards:
    """The linear layers and the embedding of ``policy``, spread over the ``size`` processes of the process group.

    Each is a unit of its own: of the VLM's last layer only a part is ever computed, and the weights of a unit must
    have one dtype, which those of a whole layer do not have. All else (norms, projections, heads: less than 1 % of the
    full-size policy) every process has whole. Afterwards the weights are whole; only ``spread`` changes that.
    """

    def __init__(self, policy: Policy, size: int) -> None:
        device = policy.device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # where FSDP puts what it gathers
        # it warns of operations in place on what a unit returns: the network has none
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh(device.type, (size,))
        towers = (policy.model.vision.encoder, policy.model.text, policy.model.expert)
        self._units: list[FSDPModule] = []
        for module in [each for tower in towers for each in tower.modules()]:
            if isinstance(module, nn.Linear | nn.Embedding):
                unit = fully_shard(module, mesh=mesh, reshard_after_forward=True)
                # gradients add up, as those of the other weights do
                unit.set_gradient_divide_factor(1.0)
                unit.set_force_sum_reduction_for_comms(True)
                self._units.append(unit)
        self._gather()

    @contextmanager
    def spread(self) -> Iterator[None]:
        """Every process has its part in the block, and everything after it; all must enter and leave it together."""
        for unit in self._units:
            unit.set_reshard_after_forward(True)
            unit.reshard()
        yield  # after an error nobody gathers: the others may not be there to take part
        self._gather()

    def _gather(self) -> None:
        for unit in self._units:
            unit.set_reshard_after_forward(False)
            unit.unshard()


def whole(tensor: Tensor) -> Tensor:
    """All of ``tensor``, which may be spread; then every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Of ``tensor``, which every process has, what this one has of ``parameter``."""
    if not isinstance(parameter, DTensor):
        return tensor
    tensor = tensor.to(parameter.device)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
