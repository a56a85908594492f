"""Reading LeRobot's pi0 and pi0.5 checkpoints, with their processors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pi0rl.errors import UserError
from pi0rl.policy.config import Pi0Config
from pi0rl.policy.foreign import canonical, find_tokenizer, infer_config
from pi0rl.policy.policy import Policy
from pi0rl.policy.processing import Normalisation, Processing
from pi0rl.policy.weights import assign, read_json, read_safetensors

_PREPROCESSOR, _POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
_METHODS = {"MEAN_STD": ("mean_std", "mean", "std"), "QUANTILES": ("quantile", "q01", "q99")}
_EXPERT = "paligemma_with_expert.gemma_expert.model."


def _step(file: Path, name: str) -> dict[str, Any] | None:
    """The configuration of the pipeline's step of that name, or None."""
    steps = read_json(file).get("steps", [])
    return next((step for step in steps if step.get("registry_name") == name), None)


def _normalisation(file: Path, step_name: str, kind: str, feature: str) -> Normalisation:
    """Statistics of one feature as a pipeline's (un)normaliser applies them; method and file are the checkpoint's."""
    step = _step(file, step_name)
    if step is None or "state_file" not in step:
        raise UserError(f"{file}: no step {step_name} with a state_file; this policy cannot act without its statistics")
    named = step["config"]["norm_map"].get(kind)
    if named not in _METHODS:
        raise UserError(f"{file}: norm_map.{kind} is {named}, expected one of {', '.join(_METHODS)}")
    method, *keys = _METHODS[named]
    stats_file = file.parent / step["state_file"]
    if not stats_file.is_file():
        raise UserError(f"{stats_file}: not found, but {file.name} names it; download the whole checkpoint")
    stats = load_file(stats_file)
    missing = [f"{feature}.{key}" for key in keys if f"{feature}.{key}" not in stats]
    if missing:
        raise UserError(f"{stats_file}: {missing[0]} is missing, but norm_map.{kind} is {named}")
    first, second = (tuple(stats[f"{feature}.{key}"].double().tolist()) for key in keys)
    return Normalisation(method, first, second, convention="lerobot")  # pyright: ignore[reportArgumentType]


def read_normalisations(directory: Path) -> tuple[Normalisation, Normalisation]:
    """State and action statistics of a checkpoint's processor files."""
    return (
        _normalisation(directory / _PREPROCESSOR, "normalizer_processor", "STATE", "observation.state"),
        _normalisation(directory / _POSTPROCESSOR, "unnormalizer_processor", "ACTION", "action"),
    )


def _refuse_relative_actions(directory: Path) -> None:
    step = _step(directory / _PREPROCESSOR, "relative_actions_processor")
    if step is not None and step["config"].get("enabled"):
        raise UserError(f"{directory / _PREPROCESSOR}: relative_actions_processor is enabled, which is not supported")


def lerobot_weights(tensors: dict[str, Tensor], pi05: bool) -> dict[str, Tensor]:
    """LeRobot's names to ours: without ``model.``, and without what its own loader renames or drops."""
    named = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    if pi05:
        named = {name.replace("action_time_mlp_", "time_mlp_"): tensor for name, tensor in named.items()}
        plain_norms = ("layernorm.weight", "model.norm.weight")
        named = {
            name: tensor
            for name, tensor in named.items()
            if not name.startswith("state_proj.") and not (name.startswith(_EXPERT) and name.endswith(plain_norms))
        }
    return canonical(named)


def lerobot_processing(directory: Path, config: Pi0Config, token_len: int) -> Processing:
    """What LeRobot's pipeline does with LIBERO's observations: torch resizing, its own statistics, no delta actions."""
    _refuse_relative_actions(directory)
    state_norm, action_norm = read_normalisations(directory)
    return Processing(
        image_size=config.vision.image_size,
        state_dim=config.state_dim,
        action_dim=config.action_dim,
        token_len=token_len,
        tokenizer=find_tokenizer([directory]),
        state_norm=state_norm,
        action_norm=action_norm,
        prompt_style="text_and_state" if config.pi05 else "lerobot_text",
        resize="torch",
    )


def load_lerobot(directory: Path, config: Pi0Config | None = None) -> Policy:
    """A checkpoint of LeRobot's ``pi0`` or ``pi05``, on the CPU in its own dtypes.

    Args:
        config: the architecture, where it cannot be seen in the shapes.
    """
    file = directory / "config.json"
    described = read_json(file)
    pi05 = described["type"] == "pi05"
    tensors = lerobot_weights(read_safetensors(directory), pi05)
    length = int(described["tokenizer_max_length"])
    if config is None:
        config = replace(infer_config(tensors, int(described["chunk_size"]), directory), max_token_len=length)
    if config.pi05 != pi05:
        raise UserError(
            f"{file}: type is {described['type']}, but the weights are of {'pi05' if config.pi05 else 'pi0'}"
        )
    with torch.device("meta"):
        policy = Policy(config, lerobot_processing(directory, config, length))
    assign(policy, tensors, directory)
    return policy
