"""The moving average of weights: it lags behind training, and does not shake with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class MovingAverage:
    """An exponential moving average of weights, in float32, in which small steps are not rounded away.

    Args:
        weights: what it begins with.
        decay: what stays of it when it follows, in [0, 1].
        device: where it is kept; left out, where the weights are.

    Attributes:
        values: the average, in the order of the weights.
    """

    def __init__(self, weights: Sequence[Tensor], decay: float, device: str | None = None) -> None:
        self._decay = decay
        self.values = [weight.detach().to(device or weight.device, torch.float32, copy=True) for weight in weights]

    @torch.no_grad()
    def follow(self, weights: Sequence[Tensor]) -> None:
        """Move towards ``weights``."""
        for value, weight in zip(self.values, weights, strict=True):
            value.lerp_(weight.detach().to(value.device, torch.float32), 1 - self._decay)

    @contextmanager
    def in_place_of(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """In the block ``weights`` hold the average, and afterwards what they held."""
        aside = [
            weight.detach().to(value.device, copy=True) for value, weight in zip(self.values, weights, strict=True)
        ]
        put(weights, self.values)
        try:
            yield
        finally:
            put(weights, aside)


@torch.no_grad()
def put(weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy ``values`` into ``weights``."""
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)
