"""How much memory a policy will take, found by running the real code on tensors without data.

Nothing is computed and next to nothing allocated: PyTorch's fake tensors have shapes and dtypes only, and a counter
follows which of them are alive. So there is no second description of the network to keep up to date.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pi0rl.policy.config import Pi0Config
from pi0rl.policy.critic import CriticConfig, NoiseHeadConfig
from pi0rl.policy.lora import LoraConfig, with_lora
from pi0rl.policy.model import ModelInputs, Prefix
from pi0rl.policy.policy import Policy
from pi0rl.policy.precision import Precision, materialise
from pi0rl.policy.processing import Normalisation, tiny_processing
from pi0rl.policy.sampling import SamplerConfig, SamplingNoise, evaluate_chains, sample


@dataclass(frozen=True)
class MemoryConfig:
    """Everything that decides it.

    Attributes:
        model, critic, exploration, sampler: as for the policy itself.
        precision: of the stored weights.
        train_expert_only, gradient_checkpointing: as in training.
        look_batch: observations per look of the rollout.
        micro_batch: samples per forward and backward pass.
        language: language positions that are computed.
        gpu: whether the optimiser steps all weights at once, as it does there.
        lora_rank: of adapters on the VLM; None without.
    """

    model: Pi0Config
    critic: CriticConfig | None
    exploration: NoiseHeadConfig | None
    sampler: SamplerConfig
    precision: Precision
    train_expert_only: bool
    gradient_checkpointing: bool
    look_batch: int
    micro_batch: int
    language: int
    gpu: bool
    lora_rank: int | None = None

    @property
    def cameras(self) -> int:
        """Images that are computed: LIBERO's two, and for critics that pool padding the one it does not have."""
        return 3 if self.critic is not None and self.critic.reads_padding else 2


@dataclass(frozen=True)
class PolicyMemory:
    """Counts of parameters, and bytes.

    Attributes:
        parameters, trained: how many.
        weights: of the whole policy.
        gradients: of what is trained.
        optimizer: AdamW's two moments.
        look_cache, update_cache: keys and values of the prefix, of a look and of a micro batch.
        look: the most that a look takes beside the weights, its cache included.
        update: the most that an update takes beside weights, gradients and moments, its cache included.
    """

    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int
    look_cache: int
    update_cache: int
    look: int
    update: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, beside the policy's own; ``peak`` is the most there were at once."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.live = self.peak = 0
        before = [tensor for parameter in policy.parameters() for tensor in (parameter, parameter.grad)]
        self._known = {tensor.untyped_storage()._cdata for tensor in before if tensor is not None}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@lru_cache
def predict(config: MemoryConfig) -> PolicyMemory:
    """Memory of a policy and of its use."""
    policy = _policy(config)
    with FakeTensorMode():
        materialise(policy, config.precision)
        trained = list(policy.trainable_parameters(config.train_expert_only).values())
        policy.model.set_gradient_checkpointing(config.gradient_checkpointing)
        look_cache, look = _look(policy, config)
        update_cache, update = _update(policy, trained, config)
    gradients = sum(parameter.nbytes for parameter in trained)
    return PolicyMemory(
        parameters=sum(parameter.numel() for parameter in policy.parameters()),
        trained=sum(parameter.numel() for parameter in trained),
        weights=sum(parameter.nbytes for parameter in policy.parameters()),
        gradients=gradients,
        optimizer=2 * gradients,
        look_cache=look_cache,
        update_cache=update_cache,
        look=look,
        update=max(update, gradients) if config.gpu else update,  # AdamW's temporaries in the step of all at once
    )


def _policy(config: MemoryConfig) -> Policy:
    """On the meta device."""
    unused = Normalisation("mean_std", (), ())
    processing = tiny_processing(config.model, unused, unused, ("",))
    with torch.device("meta"):
        policy = Policy(config.model, processing, config.critic, config.exploration)
    return with_lora(policy, None if config.lora_rank is None else LoraConfig(config.lora_rank, seed=0))


def _inputs(config: MemoryConfig, batch: int) -> ModelInputs:
    side = config.model.vision.image_size
    return ModelInputs(
        images=torch.empty(batch, config.cameras, 3, side, side),
        image_mask=torch.ones(batch, config.cameras, dtype=torch.bool),
        tokens=torch.zeros(batch, config.language, dtype=torch.int64),
        token_mask=torch.ones(batch, config.language, dtype=torch.bool),
        state=torch.empty(batch, config.model.state_dim),
    )


def _look(policy: Policy, config: MemoryConfig) -> tuple[int, int]:
    """Bytes of the cache, and at most."""
    steps, batch = config.sampler.num_steps, config.look_batch
    chunk = (config.model.action_horizon, config.model.action_dim)
    noise = SamplingNoise(torch.empty(batch, *chunk), torch.empty(batch, steps, *chunk), torch.empty(batch))
    with torch.no_grad(), LiveBytes(policy) as counter:
        inputs = _inputs(config, batch)
        prefix = policy.full_prefix(inputs)
        sample(policy, prefix, noise, config.sampler, "train", torch.empty(batch))
    return _cache_bytes(prefix), counter.peak


def _update(policy: Policy, trained: list[nn.Parameter], config: MemoryConfig) -> tuple[int, int]:
    """Bytes of the cache, and at most, in a micro batch that is not the first: gradients are there already."""
    batch, kept = config.micro_batch, 1 if config.sampler.stochastic in ("single", "last") else config.sampler.num_steps
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    chains = torch.empty(batch, config.sampler.num_steps + 1, config.model.action_horizon, config.model.action_dim)
    inds = torch.zeros(batch, kept, dtype=torch.int64)
    with LiveBytes(policy) as counter:
        inputs = _inputs(config, batch)
        with torch.set_grad_enabled(policy.trains_prefix(config.train_expert_only)):
            prefix = policy.full_prefix(inputs)
        evaluation = evaluate_chains(policy, prefix, chains, inds, config.sampler, torch.empty(batch))
        (evaluation.log_probs.mean() + evaluation.values.mean() + evaluation.entropy.mean()).backward()
    return _cache_bytes(prefix), counter.peak


def _cache_bytes(prefix: Prefix) -> int:
    return sum(tensor.nbytes for pair in prefix.cache for tensor in pair)
