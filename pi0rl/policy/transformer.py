"""The Gemma stack that both the prefix (VLM) and the action expert are made of. Modules are named as in checkpoints.

Prefix tokens never attend to suffix tokens, so the prefix is always computed first and leaves its keys and values per
layer; the expert then attends to [prefix; suffix]. Training and sampling share this one path.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi0rl.policy.config import TransformerConfig
from pi0rl.policy.recomputation import recomputed
from pi0rl.policy.vision import uninitialised_embedding

RMS_EPS = 1e-6
ROPE_THETA = 10_000.0
# Added to forbidden scores. Large enough to swallow any score, so a query that may see nothing attends uniformly to
# everything (the references pool such rows in one critic option); -inf would give NaN there.
FORBIDDEN = -2.3819763e38

KeyValue = tuple[Tensor, Tensor]
"""Keys (rotated) and values of one layer, each [B, num_kv_heads, L, head_dim]."""

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the rotary embedding, each float32 [B, 1, L, head_dim / 2]."""


def rotation(positions: Tensor, head_dim: int) -> Rotation:
    """Rotary angles for integer positions [B, L]."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[:, None, :, None].to(torch.float32) * (1.0 / ROPE_THETA**exponent)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: Rotation) -> Tensor:
    """Apply rotary positions to x [B, heads, L, head_dim] (half-split layout), in float32."""
    cos, sin = rope
    first, second = x.to(torch.float32).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def attention_bias(allowed: Tensor, queries_per_key: int) -> Tensor:
    """Additive float32 bias [B, 1, queries_per_key * Lq, Lk] from bool [B, Lq, Lk], as ``Attention`` folds heads."""
    bias = torch.zeros(allowed.shape, device=allowed.device).masked_fill_(~allowed, FORBIDDEN)
    return bias.repeat(1, queries_per_key, 1)[:, None]


class RMSNorm(nn.Module):
    """RMS norm whose weight is an offset from one; the condition is unused and there is no gate."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """[B, L, width] -> (normalised, None)."""
        return F.rms_norm(x.float(), x.shape[-1:], 1.0 + self.weight.float(), RMS_EPS).to(x.dtype), None


class AdaptiveRMSNorm(nn.Module):
    """pi0.5: scale, shift and gate come from the time condition."""

    def __init__(self, width: int):
        super().__init__()
        self.dense = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """[B, L, width], condition float32 [B, width] -> (modulated, gate [B, 1, width])."""
        assert condition is not None, "an adaptive norm needs the time condition"
        scale, shift, gate = self.dense(condition.to(self.dense.weight.dtype))[:, None].float().chunk(3, dim=-1)
        normalised = F.rms_norm(x.float(), x.shape[-1:], None, RMS_EPS)
        return (normalised * (1.0 + scale) + shift).to(x.dtype), gate.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention over this stack's tokens and, where given, those already cached."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.q_proj = nn.Linear(config.width, config.num_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.width, config.num_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.width, config.num_kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.width, bias=False)

    def keys_values(self, x: Tensor, rope: Rotation) -> KeyValue:
        """[B, L, width] -> keys and values of these tokens."""
        heads = (self.config.num_kv_heads, self.config.head_dim)
        keys = self.k_proj(x).unflatten(-1, heads).transpose(1, 2)
        return rotate(keys, rope), self.v_proj(x).unflatten(-1, heads).transpose(1, 2)

    def forward(self, x: Tensor, rope: Rotation, bias: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """[B, L, width], bias [B, 1, groups * L, past + L] -> (attended [B, L, width], own keys and values)."""
        config, (batch, length) = self.config, x.shape[:2]
        own = self.keys_values(x, rope)
        keys, values = own if past is None else (torch.cat((past[i].to(x.dtype), own[i]), dim=2) for i in range(2))
        queries = rotate(self.q_proj(x).unflatten(-1, (config.num_heads, config.head_dim)).transpose(1, 2), rope)
        # Query heads that share a key head are folded into the sequence: one larger product instead of several small.
        folded = queries.reshape(batch, config.num_kv_heads, config.queries_per_key * length, config.head_dim)
        attended = F.scaled_dot_product_attention(folded, keys, values, attn_mask=bias.to(x.dtype))
        attended = attended.reshape(batch, config.num_heads, length, config.head_dim).transpose(1, 2).flatten(2)
        return self.o_proj(attended), own


class GatedMLP(nn.Module):
    """Gemma's feed-forward: down(gelu_tanh(gate(x)) * up(x))."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp_dim, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp_dim, bias=False)
        self.down_proj = nn.Linear(config.mlp_dim, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


def _add(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    return x + branch if gate is None else x + gate * branch


class GemmaLayer(nn.Module):
    """Pre-norm block; with adaptive norms each branch is multiplied by its norm's gate."""

    def __init__(self, config: TransformerConfig, adaptive: bool):
        super().__init__()
        norm = AdaptiveRMSNorm if adaptive else RMSNorm
        self.input_layernorm = norm(config.width)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = norm(config.width)
        self.mlp = GatedMLP(config)

    def forward(
        self, x: Tensor, rope: Rotation, bias: Tensor, past: KeyValue | None = None, condition: Tensor | None = None
    ) -> tuple[Tensor, KeyValue]:
        """[B, L, width] -> (the same, this layer's own keys and values)."""
        normalised, gate = self.input_layernorm(x, condition)
        attended, own = self.self_attn(normalised, rope, bias, past)
        x = _add(x, attended, gate)
        normalised, gate = self.post_attention_layernorm(x, condition)
        return _add(x, self.mlp(normalised), gate), own


class Gemma(nn.Module):
    """A stack of layers and a final norm; ``vocab_size`` adds the token embedding (prefix stack only).

    Attributes:
        gradient_checkpointing: keep no activations of a layer for the backward pass but its input.
    """

    def __init__(self, config: TransformerConfig, vocab_size: int | None = None, adaptive: bool = False):
        super().__init__()
        self.gradient_checkpointing = False
        if vocab_size is not None:
            self.embed_tokens = uninitialised_embedding(vocab_size, config.width)
        self.layers = nn.ModuleList(GemmaLayer(config, adaptive) for _ in range(config.depth))
        self.norm = (AdaptiveRMSNorm if adaptive else RMSNorm)(config.width)

    @property
    def dtype(self) -> torch.dtype:
        """What the layers compute in (norms have their own dtype)."""
        return cast(GemmaLayer, self.layers[0]).mlp.gate_proj.weight.dtype

    def encode(
        self, x: Tensor, rope: Rotation, bias: Tensor, with_output: bool
    ) -> tuple[list[KeyValue], Tensor | None]:
        """Prefix pass: [B, L, width] -> (keys and values per layer, final-norm output or None).

        Without ``with_output`` the last layer stops at its keys and values: nothing else of it is ever read.
        """
        x, cache = x.to(self.dtype), []
        for layer in self.layers if with_output else list(self.layers)[:-1]:
            x, own = self._run(layer, x, rope, bias)
            cache.append(own)
        if with_output:
            return cache, self.norm(x)[0]
        last = cast(GemmaLayer, self.layers[-1])
        cache.append(last.self_attn.keys_values(last.input_layernorm(x)[0], rope))
        return cache, None

    def attend(
        self, x: Tensor, rope: Rotation, bias: Tensor, cache: tuple[KeyValue, ...], condition: Tensor | None
    ) -> Tensor:
        """Suffix pass: [B, S, width] attending to the cache and itself -> final-norm output [B, S, width]."""
        x = x.to(self.dtype)
        for layer, past in zip(self.layers, cache, strict=True):
            x, _ = self._run(layer, x, rope, bias, past, condition)
        return self.norm(x, condition)[0]

    def _run(self, layer: nn.Module, *arguments: Tensor | KeyValue | None) -> tuple[Tensor, KeyValue]:
        return recomputed(layer, *arguments) if self.gradient_checkpointing else layer(*arguments)
