"""Writing checkpoints in openpi's and LeRobot's layouts.

Neither layout can say everything (value heads, our tokenizer of LIBERO's words, unusual sizes), so ``pi0rl.json``
beside the weights holds the rest, and reading back gives the very same policy. What the other system would do
differently is named by ``openpi_differences`` and ``lerobot_differences``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pi0rl.errors import UserError
from pi0rl.files import replace_directory
from pi0rl.policy.config import PI0, Pi0Config
from pi0rl.policy.description import describe, read_description, write_tokenizer
from pi0rl.policy.foreign import EMBEDDING, NORM_STATS, TIED_EMBEDDING, UNUSED_HEAD
from pi0rl.policy.lerobot import lerobot_processors, lerobot_weights
from pi0rl.policy.policy import Policy
from pi0rl.policy.processing import ENV_ACTION_DIM, Normalisation, Processing
from pi0rl.policy.tokenizer import HuggingFaceTokenizer, WordTokenizer
from pi0rl.policy.weights import (
    HEADS,
    SINGLE,
    assign,
    policy_tensors,
    read_json,
    read_safetensors,
    sha256,
    write_safetensors,
)

SIDECAR = "pi0rl.json"
_HEADS = ("value_head.", "noise_head.")


def save_openpi(policy: Policy, directory: Path) -> None:
    """Write openpi's PyTorch layout, which RLinf reads too; ``directory`` appears complete or not at all."""
    with replace_directory(directory) as temporary:
        network, heads = _split(policy)
        network[TIED_EMBEDDING] = network.pop(EMBEDDING)  # the name that openpi's save_model keeps
        _write_weights(temporary, network, heads)
        config = policy.config
        described = {
            "action_dim": config.action_dim,
            "action_horizon": config.action_horizon,
            "paligemma_variant": "gemma_2b" if config.text == PI0.text else "custom",
            "action_expert_variant": "gemma_300m" if config.expert == PI0.expert else "custom",
            "precision": _precision(network),
            "pi05": config.pi05,
            "discrete_state_input": policy.processing.prompt_style == "text_and_state",
        }
        _write_json(temporary / "config.json", described)
        for place in (NORM_STATS, f"assets/{NORM_STATS}"):  # where RLinf looks, and where openpi does
            (temporary / place).parent.mkdir(parents=True)
            _write_json(temporary / place, norm_stats(policy.processing))
        _write_sidecar(policy, temporary, write_tokenizer(policy.processing.tokenizer, temporary))


def save_lerobot(policy: Policy, directory: Path) -> None:
    """Write LeRobot's layout, with its processor files; ``directory`` appears complete or not at all."""
    with replace_directory(directory) as temporary:
        network, heads = _split(policy)
        network[TIED_EMBEDDING] = network[EMBEDDING].clone()  # LeRobot no longer ties them: both are in its files
        precision = _precision(network)
        _write_weights(temporary, {f"model.{name}": tensor for name, tensor in network.items()}, heads)
        tokenizer = policy.processing.tokenizer
        file = write_tokenizer(tokenizer, temporary, "tokenizer")
        if isinstance(tokenizer, HuggingFaceTokenizer):
            settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "pad_token": "<pad>"}
            _write_json(temporary / "tokenizer/tokenizer_config.json", settings | {"padding_side": "right"})
        for name, content in lerobot_processors(policy.config, policy.processing).items():
            if isinstance(content, dict) and all(isinstance(value, Tensor) for value in content.values()):
                write_safetensors(temporary / name, content)
            else:
                _write_json(temporary / name, content)
        _write_json(temporary / "config.json", _lerobot_config(policy.config, policy.processing, precision))
        _write_sidecar(policy, temporary, file)


def load_exported(directory: Path) -> Policy:
    """Read what ``save_openpi`` or ``save_lerobot`` wrote, exactly; refused where a file beside it was changed."""
    stored = read_json(directory / SIDECAR)
    for name, digest in stored.get("files", {}).items():
        if not (directory / name).is_file() or sha256(directory / name) != digest:
            raise UserError(
                f"{directory / name}: missing or changed since {SIDECAR} was written; restore it, or delete {SIDECAR} "
                "to read the checkpoint without it"
            )
    policy = read_description(directory / SIDECAR).empty_policy()
    assign(policy, lerobot_weights(read_safetensors(directory), policy.config.pi05), directory)
    return policy


def norm_stats(processing: Processing) -> dict[str, Any]:
    """openpi's ``norm_stats.json``; other systems' conventions are translated to its 1e-6 on every scale."""
    parts = {"state": processing.state_norm, "actions": processing.action_norm}
    return {"norm_stats": {key: _openpi_statistics(norm) for key, norm in parts.items()}}


def _openpi_statistics(norm: Normalisation) -> dict[str, list[float]]:
    first, second = np.asarray(norm.first), np.asarray(norm.second)
    if norm.convention == "lerobot":
        second = second - 1e-6
    names = ("mean", "std") if norm.method == "mean_std" else ("q01", "q99")
    return {names[0]: first.tolist(), names[1]: second.tolist()}


def openpi_differences(policy: Policy) -> list[str]:
    """What openpi's and RLinf's LIBERO configs do differently from this policy; empty where they do the same."""
    processing, pi05 = policy.processing, policy.config.pi05
    name, wanted = ("pi05_libero", "quantile") if pi05 else ("pi0_libero", "mean_std")
    found = _sizes(policy, 200 if pi05 else 48)
    if processing.prompt_style == "text_and_state":
        found.append(f"{name} leaves the state out of the prompt; set discrete_state_input=True in openpi's config")
    if processing.prompt_style == "lerobot_text":
        found.append("openpi strips the prompt and replaces underscores, LeRobot's pi0 does not")
    if processing.delta_actions == pi05:
        found.append(f"{name} has the other delta transform; set extra_delta_transform={processing.delta_actions}")
    if processing.action_norm.method != wanted:
        found.append(f"{name} normalises by {wanted}, this policy by {processing.action_norm.method}")
    if processing.resize != "pil":
        found.append("openpi resizes images with Pillow, this policy with torch (pixels differ by rounding)")
    return found


def lerobot_differences(policy: Policy) -> list[str]:
    """What LeRobot's pipeline does differently from this policy; empty where it does the same."""
    processing, pi05 = policy.processing, policy.config.pi05
    found = _sizes(policy, processing.token_len)
    if pi05 and processing.prompt_style != "text_and_state":
        found.append("LeRobot's pi05 always spells the state out in the prompt, this policy was trained without")
    if processing.resize != "torch":
        found.append("LeRobot resizes images with torch, this policy with Pillow (pixels differ by rounding)")
    if policy.value_head is not None or policy.noise_head is not None:
        found.append(f"LeRobot has no value or noise head; they are in {HEADS}")
    return found


def _sizes(policy: Policy, token_len: int) -> list[str]:
    found = []
    if (policy.config.vision, policy.config.text, policy.config.expert) != (PI0.vision, PI0.text, PI0.expert):
        found.append("the towers are not the full-size ones; the other system needs a configuration of these sizes")
    if isinstance(policy.processing.tokenizer, WordTokenizer):
        found.append("the tokenizer is pi0rl's own, of LIBERO's words; the other system would use PaliGemma's")
    if policy.processing.token_len != token_len:
        found.append(f"{policy.processing.token_len} language positions instead of {token_len}; set max_token_len")
    return found


def _split(policy: Policy) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The network's tensors with the expert's unused head, which strict loaders ask for, and those of our heads."""
    tensors = policy_tensors(policy)
    heads = {name: tensor for name, tensor in tensors.items() if name.startswith(_HEADS)}
    network = {name: tensor for name, tensor in tensors.items() if name not in heads}
    shape = (policy.config.vocab_size, policy.config.expert.width)
    network[UNUSED_HEAD] = torch.zeros(shape, dtype=network[EMBEDDING].dtype)
    return network, heads


def _write_weights(directory: Path, network: dict[str, Tensor], heads: dict[str, Tensor]) -> None:
    write_safetensors(directory / SINGLE, network)
    if heads:
        write_safetensors(directory / HEADS, heads)


def _precision(tensors: dict[str, Tensor]) -> str:
    return "bfloat16" if any(tensor.dtype == torch.bfloat16 for tensor in tensors.values()) else "float32"


def _lerobot_config(config: Pi0Config, processing: Processing, precision: str) -> dict[str, Any]:
    """LeRobot's policy configuration; what is left out has LeRobot's default."""
    side = config.vision.image_size
    method = {"mean_std": "MEAN_STD", "quantile": "QUANTILES"}
    camera = {"type": "VISUAL", "shape": [3, 256, 256]}
    return {
        "type": "pi05" if config.pi05 else "pi0",
        "input_features": {
            "observation.images.image": camera,
            "observation.images.image2": camera,
            "observation.state": {"type": "STATE", "shape": [len(processing.state_norm.first)]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [ENV_ACTION_DIM]}},
        "device": "cpu",
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "dtype": precision,
        "chunk_size": config.action_horizon,
        "n_action_steps": config.action_horizon,
        "max_state_dim": config.state_dim,
        "max_action_dim": config.action_dim,
        "num_inference_steps": 10,
        "image_resolution": [side, side],
        "empty_cameras": 0,
        "use_relative_actions": processing.delta_actions,
        "tokenizer_max_length": processing.token_len,
        "normalization_mapping": {
            "VISUAL": "IDENTITY",
            "STATE": method[processing.state_norm.method],
            "ACTION": method[processing.action_norm.method],
        },
    }


def _write_sidecar(policy: Policy, directory: Path, tokenizer_file: str | None) -> None:
    """The description, and digests of the small files it repeats, so that editing one of them is noticed."""
    small = sorted(f for f in directory.rglob("*") if f.is_file() and f.name not in (SINGLE, HEADS))
    digests = {str(file.relative_to(directory)): sha256(file) for file in small}
    _write_json(directory / SIDECAR, describe(policy, tokenizer_file) | {"files": digests})


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n")
