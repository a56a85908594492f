"""pi0 and pi0.5: images, words and state in; a velocity field over action chunks out.

Conventions (openpi): t = 1 is noise, t = 0 is data; x_t = t * noise + (1 - t) * actions; velocity = noise - actions.
Parameter names are those of openpi's PyTorch checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi0rl.policy.config import Pi0Config
from pi0rl.policy.transformer import Gemma, KeyValue, attention_bias, rotation
from pi0rl.policy.vision import VisionTower

TIME_PERIODS = (0.004, 4.0)
# Prompts are cut to multiples of this: little beside an image's 256 tokens, and few shapes to choose kernels for.
LANGUAGE_MULTIPLE = 16


@dataclass(frozen=True)
class ModelInputs:
    """What the network sees of B observations.

    Attributes:
        images: float32 [B, cameras, 3, R, R] in [-1, 1]; cameras nobody has are simply left out.
        image_mask: bool [B, cameras].
        tokens: int64 [B, L], 0 where padded.
        token_mask: bool [B, L].
        state: float32 [B, state_dim], normalised and zero padded.
    """

    images: Tensor
    image_mask: Tensor
    tokens: Tensor
    token_mask: Tensor
    state: Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def to(self, device: torch.device | str) -> ModelInputs:
        """The same on another device."""
        return ModelInputs(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def rows(self, index: Tensor) -> ModelInputs:
        """The observations at ``index`` (int64 or bool)."""
        return ModelInputs(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def language_lengths(self) -> Tensor:
        """Language positions worth computing, int64 [B]: up to the last valid one, rounded up to a few lengths."""
        longest = self.tokens.shape[1]
        ends = (self.token_mask * torch.arange(1, longest + 1, device=self.tokens.device)).amax(1).clamp_min(1)
        return (ends + -ends % LANGUAGE_MULTIPLE).clamp_max(longest)

    def without_padding(self) -> ModelInputs:
        """Leave out cameras that are masked in every row, and language beyond the longest row's.

        No valid token attends to them and they do not advance positions, so no output changes but by rounding.
        """
        cameras, length = self.image_mask.any(0), int(self.language_lengths().max())
        if bool(cameras.all()) and length == self.tokens.shape[1]:
            return self
        return replace(
            self,
            images=self.images[:, cameras],
            image_mask=self.image_mask[:, cameras],
            tokens=self.tokens[:, :length],
            token_mask=self.token_mask[:, :length],
        )


@dataclass(frozen=True)
class Prefix:
    """Everything the expert needs to know about B observations, computed once per look.

    Attributes:
        cache: per layer the prefix's keys and values, each [B, num_kv_heads, Lp, head_dim].
        mask: bool [B, Lp], valid prefix tokens.
        state: [B, state_dim].
        critic_features: float32 [B, F] of the critic on the prefix; None for a critic on the expert, or none at all.
    """

    cache: tuple[KeyValue, ...]
    mask: Tensor
    state: Tensor
    critic_features: Tensor | None = None

    def __len__(self) -> int:
        return self.mask.shape[0]

    def rows(self, index: Tensor) -> Prefix:
        """The observations at ``index`` (int64 or bool)."""
        features = self.critic_features
        return Prefix(
            cache=tuple((keys[index], values[index]) for keys, values in self.cache),
            mask=self.mask[index],
            state=self.state[index],
            critic_features=None if features is None else features[index],
        )


def concatenate(prefixes: list[Prefix]) -> Prefix:
    """Join prefixes along the batch; shorter ones are filled up with masked tokens."""
    features = [p.critic_features for p in prefixes if p.critic_features is not None]
    length = max(p.mask.shape[1] for p in prefixes)
    missing = [length - p.mask.shape[1] for p in prefixes]

    def join(layer: int, kind: int) -> Tensor:
        parts = zip((p.cache[layer][kind] for p in prefixes), missing, strict=True)
        return torch.cat([F.pad(part, (0, 0, 0, count)) for part, count in parts])

    return Prefix(
        cache=tuple((join(layer, 0), join(layer, 1)) for layer in range(len(prefixes[0].cache))),
        mask=torch.cat([F.pad(p.mask, (0, count)) for p, count in zip(prefixes, missing, strict=True)]),
        state=torch.cat([p.state for p in prefixes]),
        critic_features=torch.cat(features) if features else None,
    )


def time_embedding(time: Tensor, dim: int) -> Tensor:
    """Sines then cosines of t [B] at ``dim / 2`` periods spaced geometrically over [0.004, 4]; [B, dim] in t's dtype.

    In float64: with a period of 0.004, float32 phases would be off by 1e-4.
    """
    shortest, longest = TIME_PERIODS
    fraction = torch.linspace(0.0, 1.0, dim // 2, dtype=torch.float64, device=time.device)
    phase = time[:, None].to(torch.float64) * (2 * math.pi / (shortest * (longest / shortest) ** fraction))
    return torch.cat((phase.sin(), phase.cos()), dim=-1).to(time.dtype)


class Pi0(nn.Module):
    """The network; ``prefix`` once per look, ``velocity`` once per denoising step.

    Attributes:
        compiled: whether ``compile_layers`` was called.
    """

    def __init__(self, config: Pi0Config):
        super().__init__()
        self.config, self.compiled = config, False
        width, expert_width = config.text.width, config.expert.width
        vlm = nn.ModuleDict(
            {
                "vision_tower": nn.ModuleDict({"vision_model": VisionTower(config.vision)}),
                "multi_modal_projector": nn.ModuleDict({"linear": nn.Linear(config.vision.width, width)}),
                "language_model": Gemma(config.text, vocab_size=config.vocab_size),
            }
        )
        expert = Gemma(config.expert, adaptive=config.pi05)
        self.paligemma_with_expert = nn.ModuleDict(
            {"paligemma": nn.ModuleDict({"model": vlm}), "gemma_expert": nn.ModuleDict({"model": expert})}
        )
        self.action_in_proj = nn.Linear(config.action_dim, expert_width)
        self.action_out_proj = nn.Linear(expert_width, config.action_dim)
        if config.pi05:
            self.time_mlp_in = nn.Linear(expert_width, expert_width)
            self.time_mlp_out = nn.Linear(expert_width, expert_width)
        else:
            self.state_proj = nn.Linear(config.state_dim, expert_width)
            self.action_time_mlp_in = nn.Linear(2 * expert_width, expert_width)
            self.action_time_mlp_out = nn.Linear(expert_width, expert_width)

    @property
    def vision(self) -> VisionTower:
        """The image tower."""
        return cast(VisionTower, self.get_submodule("paligemma_with_expert.paligemma.model.vision_tower.vision_model"))

    @property
    def projector(self) -> nn.Linear:
        """Vision width -> text width."""
        name = "paligemma_with_expert.paligemma.model.multi_modal_projector.linear"
        return cast(nn.Linear, self.get_submodule(name))

    @property
    def text(self) -> Gemma:
        """The prefix stack."""
        return cast(Gemma, self.get_submodule("paligemma_with_expert.paligemma.model.language_model"))

    @property
    def expert(self) -> Gemma:
        """The suffix stack."""
        return cast(Gemma, self.get_submodule("paligemma_with_expert.gemma_expert.model"))

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Trade time for memory in training: keep only the input of every layer, not what happens in it."""
        for tower in (self.vision, self.text, self.expert):
            tower.gradient_checkpointing = enabled

    def compile_layers(self) -> None:
        """``torch.compile`` every layer of the towers, in place: outputs change by rounding, names not at all.

        Layer by layer, as layers of a tower share their code: it is compiled once for all of them. It happens when a
        shape is first seen, and takes a minute or so.
        """
        for layers in (self.vision.encoder["layers"], self.text.layers, self.expert.layers):
            for layer in cast(nn.ModuleList, layers):
                layer.compile()
        self.compiled = True

    def embed_prefix(self, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """Embeddings [B, Lp, width] and their valid mask bool [B, Lp]; images camera by camera, then language.

        Image features are not divided by sqrt(width), and only language is multiplied by it.
        """
        batch, cameras = inputs.image_mask.shape
        image = self.projector(self.vision(inputs.images.flatten(0, 1)))
        tokens_per_image = image.shape[1]
        image = image.reshape(batch, cameras * tokens_per_image, -1)
        language = self.text.embed_tokens(inputs.tokens) * math.sqrt(self.config.text.width)
        mask = torch.cat((inputs.image_mask.repeat_interleave(tokens_per_image, dim=1), inputs.token_mask), dim=1)
        return torch.cat((image, language.to(image.dtype)), dim=1), mask

    def prefix(self, inputs: ModelInputs, with_output: bool = False) -> tuple[Prefix, Tensor | None]:
        """Run the VLM once. Returns what the expert attends to and, if asked, the final-norm output [B, Lp, width]."""
        embeddings, mask = self.embed_prefix(inputs)
        positions = mask.cumsum(1) - 1  # masked tokens do not advance positions
        allowed = mask[:, :, None] & mask[:, None, :]
        bias = attention_bias(allowed, self.config.text.queries_per_key)
        rope = rotation(positions, self.config.text.head_dim)
        cache, output = self.text.encode(embeddings, rope, bias, with_output)
        return Prefix(tuple(cache), mask, inputs.state), output

    def embed_suffix(self, state: Tensor, x_t: Tensor, time: Tensor) -> tuple[Tensor, Tensor | None]:
        """Suffix tokens [B, suffix_len, expert width] and, for pi0.5, the time condition [B, expert width].

        Args: state [B, state_dim]; x_t float32 [B, H, action_dim]; time float32 [B] in [0, 1].
        """
        actions = self.action_in_proj(x_t)
        embedded = time_embedding(time, actions.shape[-1])
        if self.config.pi05:
            return actions, F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(embedded))))
        mixed = torch.cat((actions, embedded[:, None].expand_as(actions)), dim=-1)
        actions = self.action_time_mlp_out(F.silu(self.action_time_mlp_in(mixed)))
        return torch.cat((self.state_proj(state.to(torch.float32))[:, None], actions), dim=1), None

    def velocity(self, prefix: Prefix, x_t: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity float32 [B, H, action_dim] at x_t (same shape) and time [B]; the expert's features [B, H, width]."""
        tokens, condition = self.embed_suffix(prefix.state, x_t, time)
        allowed, positions = self._suffix_layout(prefix.mask)
        bias = attention_bias(allowed, self.config.expert.queries_per_key)
        rope = rotation(positions, self.config.expert.head_dim)
        hidden = self.expert.attend(tokens, rope, bias, prefix.cache, condition)
        features = hidden[:, -self.config.action_horizon :].to(torch.float32)
        return self.action_out_proj(features), features

    def _suffix_layout(self, prefix_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Who a suffix token may see, bool [B, S, Lp + S], and positions [B, S].

        Blocks: {prefix} < {state} < {actions}; the state token (pi0) does not see the actions.
        """
        length, device = self.config.suffix_len, prefix_mask.device
        own = torch.ones(length, length, dtype=torch.bool, device=device)
        if not self.config.pi05:
            own[0, 1:] = False
        batch = prefix_mask.shape[0]
        allowed = torch.cat((prefix_mask[:, None].expand(-1, length, -1), own.expand(batch, -1, -1)), dim=-1)
        return allowed, prefix_mask.sum(1, keepdim=True) + torch.arange(length, device=device)

    def flow_matching_loss(self, inputs: ModelInputs, actions: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Squared error of the velocity per element, [B, H, action_dim].

        Args: actions, noise float32 [B, H, action_dim]; time float32 [B] in (0, 1].
        """
        t = time[:, None, None]
        prefix, _ = self.prefix(inputs.without_padding())
        predicted, _ = self.velocity(prefix, t * noise + (1 - t) * actions, time)
        return (noise - actions - predicted).square()


def sample_training_time(shape: int, generator: torch.Generator) -> Tensor:
    """Times for imitation, float32 [shape] in [0.001, 1]: 0.999 * Beta(1.5, 1) + 0.001 (openpi), more often near noise.

    Beta(a, 1) has the distribution function t^a, so its inverse is u^(1/a).
    """
    return 0.999 * torch.rand(shape, generator=generator) ** (1 / 1.5) + 0.001
