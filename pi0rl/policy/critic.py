"""Heads beside the network: a value of the current look, and a learned exploration noise (ReinFlow)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pi0rl.errors import UserError

Pooling = Literal["mean_token", "first_token", "last_token", "mean_valid"]


@dataclass(frozen=True)
class CriticConfig:
    """Which features the value head sees, and its size.

    Attributes:
        source: ``expert``: mean over the horizon of the action expert's output at a denoising step;
            ``prefix``: the VLM's final-norm output, independent of noise and denoising step (RLinf: value_after_vlm).
        hidden: widths of the hidden ReLU layers.
        detach: stop the value loss at the features (RLinf: detach_critic_input).
        chunk_only: ``expert``: mean over the executed chunk instead of the horizon (RLinf: chunk_critic_input).
        matches_rollout: ``expert``: the rollout's value is taken at the same denoising step as the training value.
            Off as in RLinf: the rollout averages over all steps, training looks at the stochastic one.
        pooling: ``prefix``: ``mean_token`` averages image tokens of ``num_cameras`` cameras and all language positions,
            padding included (RLinf); ``first_token``; ``last_token``; ``mean_valid`` averages valid tokens only.
        num_cameras: ``mean_token``: cameras whose tokens are averaged.
        append_state: ``prefix``: append the normalised state to the pooled features; the prefix of pi0 holds no state.
        append_time: append how much of the episode's time is over, in [0, 1]: no look shows it.
    """

    source: Literal["expert", "prefix"] = "expert"
    hidden: tuple[int, ...] = (512, 256, 128)
    detach: bool = True
    chunk_only: bool = False
    matches_rollout: bool = False
    pooling: Pooling = "mean_token"
    num_cameras: int = 2
    append_state: bool = False
    append_time: bool = False

    def __post_init__(self) -> None:
        if self.append_state and self.source != "prefix":
            raise UserError("critic: append_state needs source: prefix (the expert's features hold the state already)")

    @property
    def reads_padding(self) -> bool:
        """Whether masked tokens enter the features, so that they must be computed."""
        return self.source == "prefix" and self.pooling in ("mean_token", "last_token")


def pool_prefix(output: Tensor, mask: Tensor, num_language: int, tokens_per_image: int, critic: CriticConfig) -> Tensor:
    """Pool the VLM's output [B, Lp, width] (mask bool [B, Lp], language last) to features float32 [B, width].

    ``mean_token`` of RLinf needs the whole reference prefix (all cameras, padded language): its padded rows attend
    uniformly to every token, and enter the mean.
    """
    if critic.pooling == "first_token":
        return output[:, 0].float()
    if critic.pooling == "last_token":
        return output[:, -1].float()
    if critic.pooling == "mean_valid":
        weight = mask.to(output.dtype)[..., None]
        return ((output * weight).sum(1) / weight.sum(1)).float()
    images = output[:, : critic.num_cameras * tokens_per_image]
    return torch.cat((images, output[:, output.shape[1] - num_language :]), dim=1).mean(1).float()


class ValueHead(nn.Module):
    """MLP with ReLU -> one number."""

    def __init__(self, in_width: int, hidden: tuple[int, ...]):
        super().__init__()
        widths = (in_width, *hidden)
        layers: list[nn.Module] = []
        for i in range(len(hidden)):
            layers += [nn.Linear(widths[i], widths[i + 1]), nn.ReLU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def initialise(self) -> None:
        """Hidden layers Kaiming-normal (fan out), the last N(0, 0.02), biases zero (RLinf)."""
        linears = [layer for layer in self.mlp if isinstance(layer, nn.Linear)]
        for linear in linears:
            nn.init.kaiming_normal_(linear.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(linear.bias)
        nn.init.normal_(linears[-1].weight, std=0.02)

    def forward(self, features: Tensor) -> Tensor:
        """float32 [B, in_width] -> [B]."""
        return self.mlp(features)[:, 0]


@dataclass(frozen=True)
class NoiseHeadConfig:
    """flow_noise: standard deviations learned between two bounds (RLinf's ``noise_logvar_range``, which holds stds)."""

    std_range: tuple[float, float] = (0.08, 0.16)
    hidden: tuple[int, ...] = (128, 64)


class _NoiseLayer(nn.Module):
    """A linear layer under the name it has in RLinf's checkpoints."""

    def __init__(self, in_width: int, out_width: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_width, out_width)


class NoiseHead(nn.Module):
    """Expert features -> standard deviation per action element, interpolated geometrically between the bounds."""

    logvar_min: Tensor
    logvar_max: Tensor

    def __init__(self, in_width: int, action_dim: int, config: NoiseHeadConfig):
        super().__init__()
        widths = (in_width, *config.hidden, action_dim)
        layers = nn.ModuleList(_NoiseLayer(widths[i], widths[i + 1]) for i in range(len(widths) - 1))
        self.mlp_logvar = nn.ModuleDict({"moduleList": layers})
        low, high = config.std_range
        self.register_buffer("logvar_min", torch.tensor([math.log(low**2)]))
        self.register_buffer("logvar_max", torch.tensor([math.log(high**2)]))

    def forward(self, features: Tensor) -> Tensor:
        """float32 [B, H, in_width] -> std float32 [B, H, action_dim]."""
        x = features
        for layer in self.mlp_logvar["moduleList"]:  # pyright: ignore[reportGeneralTypeIssues]
            x = torch.tanh(layer.linear_1(x))
        logvar = self.logvar_min + (self.logvar_max - self.logvar_min) * (x + 1) / 2
        return torch.exp(logvar / 2)
