"""LeRobot's pi0 and pi0.5 checkpoints: reading weights and processors, and the processor files to write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pi0rl.errors import UserError
from pi0rl.policy.config import Pi0Config
from pi0rl.policy.foreign import (
    canonical,
    check_vocabulary,
    checked_statistics,
    find_tokenizer,
    infer_config,
    whole_number,
)
from pi0rl.policy.policy import Policy
from pi0rl.policy.processing import ENV_ACTION_DIM, Normalisation, Processing
from pi0rl.policy.tokenizer import HuggingFaceTokenizer
from pi0rl.policy.weights import assign, read_json, read_safetensors, read_tensors

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
_METHODS = {"MEAN_STD": ("mean_std", "mean", "std"), "QUANTILES": ("quantile", "q01", "q99")}
_EXPERT = "paligemma_with_expert.gemma_expert.model."
_STATE, _ACTION = "observation.state", "action"
# LIBERO's action by name; LeRobot's relative_actions_processor chooses by name which stay absolute.
_ACTION_NAMES = ["x", "y", "z", "axis_angle1", "axis_angle2", "axis_angle3", "gripper"]
# What LeRobot's pipelines of pi0 and pi0.5 are made of; another step would change what the network sees or says.
_KNOWN_STEPS = (
    "rename_observations_processor",
    "to_batch_processor",
    "pi0_new_line_processor",
    "pi05_prepare_state_tokenizer_processor_step",
    "tokenizer_processor",
    "device_processor",
    "relative_actions_processor",
    "absolute_actions_processor",
    "normalizer_processor",
    "unnormalizer_processor",
)
_MODEL_SWITCHES = ("use_visual_memory", "use_proprioceptive_memory", "rtc_training_max_delay")


def _step(file: Path, name: str) -> dict[str, Any] | None:
    """The pipeline's step of that name, with its ``config``, or None; a UserError where some step is unknown."""
    steps = read_json(file).get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise UserError(f"{file}: key steps is {type(steps).__name__}, expected a list of steps; download it again")
    for step in steps:
        named = step.get("registry_name", step.get("class"))
        if named not in _KNOWN_STEPS:
            raise UserError(
                f"{file}: step {named} is not known, expected those of LeRobot's pi0 and pi05 "
                f"({', '.join(_KNOWN_STEPS)}); this policy would not see what it was trained on"
            )
    found = next((step for step in steps if step["registry_name"] == name), None)
    return None if found is None else found | {"config": found.get("config") or {}}


def _norm_map(step: Mapping[str, Any]) -> Mapping[str, Any]:
    return step["config"].get("norm_map") or {}


def _normalisation(file: Path, step_name: str, kind: str, feature: str, width: int, statistics: bool) -> Normalisation:
    """Statistics of one feature as a pipeline's (un)normaliser applies them; method and file are the checkpoint's."""
    step = _step(file, step_name)
    if step is None:
        raise UserError(
            f"{file}: no step {step_name}, which says how values are normalised; download the whole checkpoint"
        )
    if statistics and "state_file" not in step:
        raise UserError(
            f"{file}: step {step_name} has no state_file; this policy cannot act without its statistics, take them "
            "from its training run"
        )
    named = _norm_map(step).get(kind)
    if named not in _METHODS:
        raise UserError(f"{file}: norm_map.{kind} is {named}, expected one of {', '.join(_METHODS)}")
    method, *keys = _METHODS[named]
    if not statistics:
        return Normalisation(method, (), (), convention="lerobot")  # pyright: ignore[reportArgumentType]
    stats_file = file.parent / step["state_file"]
    if not stats_file.is_file():
        raise UserError(f"{stats_file}: not found, but {file.name} names it; download the whole checkpoint")
    stats = read_tensors(stats_file)
    parts = {key: tensor.double().tolist() for key in keys if (tensor := stats.get(f"{feature}.{key}")) is not None}
    first, second = checked_statistics(stats_file, feature, parts, (keys[0], keys[1]), width)
    return Normalisation(method, first, second, convention="lerobot")  # pyright: ignore[reportArgumentType]


def read_normalisations(directory: Path, statistics: bool = True) -> tuple[Normalisation, Normalisation]:
    """State and action statistics of a checkpoint's processor files; how they are applied alone without."""
    before, after = directory / PREPROCESSOR, directory / POSTPROCESSOR
    return (
        _normalisation(before, "normalizer_processor", "STATE", _STATE, 8, statistics),
        _normalisation(after, "unnormalizer_processor", "ACTION", _ACTION, ENV_ACTION_DIM, statistics),
    )


def _relative_actions(directory: Path) -> bool:
    """Whether actions are relative to the state in all dimensions but the gripper's: openpi's delta transform."""
    step = _step(directory / PREPROCESSOR, "relative_actions_processor")
    if step is None or not step["config"].get("enabled"):
        return False
    excluded, names = step["config"].get("exclude_joints") or [], step["config"].get("action_names") or []
    absolute = [any(str(joint).lower() in str(name).lower() for joint in excluded if joint) for name in names]
    if absolute != [False] * (ENV_ACTION_DIM - 1) + [True]:
        raise UserError(
            f"{directory / PREPROCESSOR}: relative_actions_processor is enabled with action_names {names} and "
            f"exclude_joints {excluded}, expected seven names of which the last alone is excluded; train it without"
        )
    return True


def lerobot_weights(tensors: Mapping[str, Tensor], pi05: bool) -> dict[str, Tensor]:
    """LeRobot's names to ours: without ``model.``, and without what its own loader renames or drops."""
    named = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    if not pi05:
        named = {f"action_{name}" if name.startswith("time_mlp_") else name: tensor for name, tensor in named.items()}
    else:
        named = {name.replace("action_time_mlp_", "time_mlp_"): tensor for name, tensor in named.items()}
        plain_norms = ("layernorm.weight", "model.norm.weight")
        named = {
            name: tensor
            for name, tensor in named.items()
            if not name.startswith("state_proj.") and not (name.startswith(_EXPERT) and name.endswith(plain_norms))
        }
    return canonical(named)


def _check_images(directory: Path, described: Mapping[str, Any]) -> None:
    """LIBERO's two cameras are fed in the order of ``input_features``: the room first, then the wrist."""
    features = described.get("input_features") or {}
    cameras = [name for name, feature in features.items() if feature.get("type") == "VISUAL"]
    if features and (len(cameras) < 2 or "wrist" in cameras[0]):
        raise UserError(
            f"{directory / 'config.json'}: input_features has the cameras {cameras}, expected the room's view and then "
            "the wrist's; this policy was not trained on LIBERO's cameras in that order"
        )
    step = _step(directory / PREPROCESSOR, "normalizer_processor")
    method = _norm_map(step).get("VISUAL", "IDENTITY") if step else "IDENTITY"
    if method != "IDENTITY":
        raise UserError(
            f"{directory / PREPROCESSOR}: norm_map.VISUAL is {method}, expected IDENTITY; such images are not supported"
        )


def lerobot_processing(
    directory: Path, config: Pi0Config, token_len: int, assets: Path | None, statistics: bool
) -> Processing:
    """What LeRobot's pipeline does with LIBERO's observations: torch resizing, its own statistics."""
    state_norm, action_norm = read_normalisations(directory, statistics)
    return Processing(
        image_size=config.vision.image_size,
        state_dim=config.state_dim,
        action_dim=config.action_dim,
        token_len=token_len,
        tokenizer=check_vocabulary(
            find_tokenizer([directory] if assets is None else [assets, directory]), config, directory
        ),
        state_norm=state_norm,
        action_norm=action_norm,
        prompt_style="text_and_state" if config.pi05 else "lerobot_text",
        resize="torch",
        delta_actions=_relative_actions(directory),
    )


def load_lerobot(
    directory: Path, assets: Path | None = None, config: Pi0Config | None = None, statistics: bool = True
) -> Policy:
    """A checkpoint of LeRobot's ``pi0`` or ``pi05``, on the CPU in its own dtypes.

    Args:
        assets: where to look for the tokenizer besides ``directory``: older checkpoints do not hold theirs.
        config: the architecture, where it cannot be seen in the shapes.
        statistics: whether to read them; else they are empty, for the caller to put in.
    """
    file = directory / "config.json"
    described = read_json(file)
    lacking = [key for key in ("type", "chunk_size", "tokenizer_max_length") if key not in described]
    if lacking:
        raise UserError(f"{file}: key {lacking[0]} is missing, expected LeRobot's policy config; download it again")
    horizon, length = (whole_number(file, key, described[key]) for key in ("chunk_size", "tokenizer_max_length"))
    switched = [key for key in _MODEL_SWITCHES if described.get(key)]
    if switched:
        raise UserError(
            f"{file}: {switched[0]} is {described[switched[0]]}, expected off; such a network is not supported"
        )
    _check_images(directory, described)
    pi05 = described["type"] == "pi05"
    stored = read_safetensors(directory)
    if any(name.removeprefix("model.").startswith("paligemma_with_expert.paligemma.vision_tower.") for name in stored):
        raise UserError(
            f"{directory}: weights are named as before September 2025 (paligemma.vision_tower.*), expected "
            "paligemma.model.vision_tower.*; migrate it with LeRobot first, or take lerobot/pi0_libero_finetuned"
        )
    adaptive = any(".input_layernorm.dense." in name for name in stored)
    if adaptive != pi05:
        raise UserError(
            f"{file}: type is {described['type']}, but the weights are of {'pi05' if adaptive else 'pi0'}; "
            "these files are of two checkpoints, download one again"
        )
    tensors = lerobot_weights(stored, pi05)
    if config is None:
        config = replace(infer_config(tensors, horizon, directory), max_token_len=length)
    with torch.device("meta"):
        policy = Policy(config, lerobot_processing(directory, config, length, assets, statistics))
    assign(policy, tensors, directory)
    return policy


def lerobot_processors(config: Pi0Config, processing: Processing) -> dict[str, dict[str, Any]]:
    """The files of LeRobot's pre- and post-processing pipelines: JSON objects, and tensors for safetensors files."""
    order = _pi05_steps if config.pi05 else _pi0_steps
    before = order(processing)
    after = [
        _normaliser("unnormalizer_processor", processing, with_state=False),
        {"registry_name": "absolute_actions_processor", "config": {"enabled": processing.delta_actions}},
        _device(),
    ]
    files: dict[str, dict[str, Any]] = {}
    for file, steps in ((PREPROCESSOR, before), (POSTPROCESSOR, after)):
        pipeline = file.removesuffix(".json")
        for index, step in enumerate(steps):
            if step["registry_name"].endswith("normalizer_processor"):
                step["state_file"] = f"{pipeline}_step_{index}_{step['registry_name']}.safetensors"
                files[step["state_file"]] = _statistics(processing)
        files[file] = {"name": pipeline, "steps": steps}
    return files


def _pi0_steps(processing: Processing) -> list[dict[str, Any]]:
    newline = {"registry_name": "pi0_new_line_processor", "config": {}}
    normaliser = _normaliser("normalizer_processor", processing, with_state=True)
    return [*_first_steps(), newline, _tokenizer(processing), _device(), _relative(processing), normaliser]


def _pi05_steps(processing: Processing) -> list[dict[str, Any]]:
    normaliser = _normaliser("normalizer_processor", processing, with_state=True)
    prompt = {"registry_name": "pi05_prepare_state_tokenizer_processor_step", "config": {}}
    return [*_first_steps(), _relative(processing), normaliser, prompt, _tokenizer(processing), _device()]


def _first_steps() -> list[dict[str, Any]]:
    return [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
    ]


def _device() -> dict[str, Any]:
    return {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}}


def _relative(processing: Processing) -> dict[str, Any]:
    names = _ACTION_NAMES if processing.delta_actions else None
    config = {"enabled": processing.delta_actions, "exclude_joints": ["gripper"], "action_names": names}
    return {"registry_name": "relative_actions_processor", "config": config}


def _tokenizer(processing: Processing) -> dict[str, Any]:
    """A tokenizer.json travels with the checkpoint; SentencePiece models LeRobot takes from the hub.

    LeRobot up to 0.6.1 knows no ``artifacts`` and reads the name beside them, which hence is PaliGemma's on the hub.
    """
    config = {"max_length": processing.token_len, "task_key": "task", "padding_side": "right", "padding": "max_length"}
    config |= {"truncation": True, "tokenizer_name": "google/paligemma-3b-pt-224"}
    step = {"registry_name": "tokenizer_processor", "config": config}
    own = isinstance(processing.tokenizer, HuggingFaceTokenizer)
    return step | ({"artifacts": {"tokenizer_name": "tokenizer"}} if own else {})


def _normaliser(name: str, processing: Processing, with_state: bool) -> dict[str, Any]:
    method = {_METHODS[key][0]: key for key in _METHODS}
    camera = {"type": "VISUAL", "shape": [3, 256, 256]}
    seen = {
        "observation.images.image": camera,
        "observation.images.image2": camera,
        _STATE: {"type": "STATE", "shape": [len(processing.state_norm.first)]},
    }
    features = (seen if with_state else {}) | {_ACTION: {"type": "ACTION", "shape": [ENV_ACTION_DIM]}}
    norm_map = {
        "VISUAL": "IDENTITY",
        "STATE": method[processing.state_norm.method],
        "ACTION": method[processing.action_norm.method],
    }
    return {"registry_name": name, "config": {"eps": 1e-8, "features": features, "norm_map": norm_map}}


def _statistics(processing: Processing) -> dict[str, Tensor]:
    """Float32 as LeRobot keeps them; openpi's 1e-6 on every scale is added to the scale itself."""
    tensors = {}
    for feature, norm in ((_STATE, processing.state_norm), (_ACTION, processing.action_norm)):
        _, *keys = next(entry for entry in _METHODS.values() if entry[0] == norm.method)
        width = ENV_ACTION_DIM if feature == _ACTION else len(norm.first)
        second = np.asarray(norm.second) + (1e-6 if norm.convention == "openpi" else 0.0)
        for key, values in zip(keys, (np.asarray(norm.first), second), strict=True):
            tensors[f"{feature}.{key}"] = torch.from_numpy(values[:width].astype(np.float32))
    return tensors
