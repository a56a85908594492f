"""Sizes of pi0 and pi0.5: the full model and the tiny one are the same code with other numbers."""

from __future__ import annotations

from dataclasses import dataclass

from pi0rl.errors import UserError


@dataclass(frozen=True)
class VisionConfig:
    """A SigLIP tower: square images cut into square patches, bidirectional transformer, no pooling."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch_size: int
    image_size: int

    @property
    def num_patches(self) -> int:
        """Tokens per image."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class TransformerConfig:
    """A Gemma stack with grouped key/value heads."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def queries_per_key(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class Pi0Config:
    """The architecture, without anything that belongs to a data set (see ``processing``) or to RL (see ``critic``).

    Attributes:
        vision, text, expert: the three towers; text and expert share depth, heads and head_dim, since their
            keys and values meet in every layer.
        vocab_size: rows of the token embedding.
        max_token_len: language positions of the reference layout (pi0 48, pi0.5 200).
        action_dim: width of the (zero padded) action vector the network denoises.
        state_dim: width of the (zero padded) state vector; unused by pi0.5.
        action_horizon: H, the actions predicted at once.
        pi05: pi0.5: no state token, time enters through adaptive RMS norms.
    """

    vision: VisionConfig
    text: TransformerConfig
    expert: TransformerConfig
    vocab_size: int
    max_token_len: int
    action_dim: int = 32
    state_dim: int = 32
    action_horizon: int = 50
    pi05: bool = False

    def __post_init__(self) -> None:
        for field in ("depth", "num_heads", "num_kv_heads", "head_dim"):
            text, expert = getattr(self.text, field), getattr(self.expert, field)
            if text != expert:
                raise UserError(
                    f"policy config: text.{field} is {text}, expert.{field} is {expert}; they must be equal"
                )
        if self.vision.image_size % self.vision.patch_size:
            size, patch = self.vision.image_size, self.vision.patch_size
            raise UserError(f"policy config: image_size {size} is no multiple of patch_size {patch}")

    @property
    def suffix_len(self) -> int:
        """Tokens the expert computes per denoising step: H actions, and in pi0 one state token before them."""
        return self.action_horizon + (0 if self.pi05 else 1)


_SIGLIP_SO400M = VisionConfig(width=1152, depth=27, mlp_dim=4304, num_heads=16, patch_size=14, image_size=224)
_GEMMA_2B = TransformerConfig(width=2048, depth=18, mlp_dim=16384, num_heads=8, num_kv_heads=1, head_dim=256)
_GEMMA_300M = TransformerConfig(width=1024, depth=18, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=256)

PI0 = Pi0Config(_SIGLIP_SO400M, _GEMMA_2B, _GEMMA_300M, vocab_size=257152, max_token_len=48)
PI05 = Pi0Config(
    _SIGLIP_SO400M, _GEMMA_2B, _GEMMA_300M, vocab_size=257152, max_token_len=200, action_horizon=10, pi05=True
)

# The smallest pi0 that learns LIBERO tasks on two CPU cores: two 64 px images of 16 tokens each, actions and state
# without zero padding, and a vocabulary of LIBERO's own words (see tokenizer.WordTokenizer).
TINY = Pi0Config(
    vision=VisionConfig(width=128, depth=2, mlp_dim=256, num_heads=4, patch_size=16, image_size=64),
    text=TransformerConfig(width=128, depth=3, mlp_dim=192, num_heads=4, num_kv_heads=1, head_dim=32),
    expert=TransformerConfig(width=128, depth=3, mlp_dim=192, num_heads=4, num_kv_heads=1, head_dim=32),
    vocab_size=128,
    max_token_len=24,
    action_dim=7,
    state_dim=8,
    action_horizon=8,
)
