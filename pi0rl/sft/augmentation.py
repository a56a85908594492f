"""openpi's augmentation of pictures in imitation; reinforcement learning never uses it.

The room's view is cropped to a random 95 % and turned by up to 5 degrees; all views change in brightness (0.7 to 1.3),
contrast (0.6 to 1.4) and saturation (0.5 to 1.5).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CROP, DEGREES = 0.95, 5.0
BRIGHTNESS, CONTRAST, SATURATION = (0.7, 1.3), (0.6, 1.4), (0.5, 1.5)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Float32 [B, cameras, 3, R, R] in [-1, 1], the room's camera first -> the same, every picture changed by itself.

    Args:
        images: what the network would see.
        generator: on the CPU; six numbers are drawn per picture, whatever its camera.
    """
    batch, cameras = images.shape[:2]
    draws = torch.rand(batch, cameras, 6, generator=generator).to(images.device)
    moved = images.clone()
    moved[:, 0] = _crop_and_turn(images[:, 0], draws[:, 0, :3])
    pixels = (moved + 1) / 2
    pixels = pixels * _between(draws[..., 3], BRIGHTNESS)
    mean = pixels.mean((2, 3, 4), keepdim=True)
    pixels = mean + (pixels - mean) * _between(draws[..., 4], CONTRAST)
    grey = pixels.mean(2, keepdim=True)
    pixels = grey + (pixels - grey) * _between(draws[..., 5], SATURATION)
    return pixels.clamp(0, 1) * 2 - 1


def _crop_and_turn(images: Tensor, draws: Tensor) -> Tensor:
    """One resampling for both; where nothing was photographed it is black."""
    angle = (draws[:, 2] * 2 - 1) * math.radians(DEGREES)
    cosine, sine = CROP * torch.cos(angle), CROP * torch.sin(angle)
    shift = (draws[:, :2] * 2 - 1) * (1 - CROP)
    matrix = torch.stack([torch.stack([cosine, -sine, shift[:, 0]], 1), torch.stack([sine, cosine, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, mode="bilinear", padding_mode="zeros", align_corners=False) - 1


def _between(draw: Tensor, limits: tuple[float, float]) -> Tensor:
    low, high = limits
    return (low + (high - low) * draw)[..., None, None, None]
