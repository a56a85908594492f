"""The SigLIP image tower. Module names follow the checkpoints' keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi0rl.policy.config import VisionConfig
from pi0rl.policy.recomputation import recomputed

LAYER_NORM_EPS = 1e-6


def uninitialised_embedding(rows: int, width: int) -> nn.Embedding:
    """An embedding without torch's own random numbers, which take 1.4 s of imports on the meta device."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class VisionEmbeddings(nn.Module):
    """Patches -> tokens plus learned positions."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.width, kernel_size=config.patch_size, stride=config.patch_size)
        self.position_embedding = uninitialised_embedding(config.num_patches, config.width)

    def forward(self, images: Tensor) -> Tensor:
        """Images float32 [N, 3, R, R] -> float32 [N, patches, width]."""
        # A stride-k convolution with kernel k is one matrix product over flattened patches.
        size = self.patch_embedding.kernel_size[0]
        n, channels, height, width = images.shape
        rows, columns = height // size, width // size
        patches = images.reshape(n, channels, rows, size, columns, size).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(n, rows * columns, channels * size * size)
        tokens = F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)
        return tokens + self.position_embedding.weight


class VisionAttention(nn.Module):
    """Full multi-head attention over the patches of one image."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, L, width] -> [N, L, width]."""
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    """Two linear layers around a tanh-approximated GELU."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_dim)
        self.fc2 = nn.Linear(config.mlp_dim, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class VisionLayer(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionTower(nn.Module):
    """SigLIP without its pooling head.

    Attributes:
        gradient_checkpointing: keep no activations of a layer for the backward pass but its input.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.gradient_checkpointing = False
        self.embeddings = VisionEmbeddings(config)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(VisionLayer(config) for _ in range(config.depth))})
        self.post_layernorm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)

    def forward(self, images: Tensor) -> Tensor:
        """Images float32 [N, 3, R, R] in [-1, 1] -> [N, patches, width]."""
        # Patch and position embeddings stay float32 in mixed precision; the blocks run in their own dtype.
        x = self.embeddings(images.to(torch.float32)).to(self.post_layernorm.weight.dtype)
        for layer in self.encoder["layers"]:  # pyright: ignore[reportGeneralTypeIssues]
            x = recomputed(layer, x) if self.gradient_checkpointing else layer(x)
        return self.post_layernorm(x)
