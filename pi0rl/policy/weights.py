"""Tensors on disk: reading safetensors by memory map, checking them against a policy, writing atomically."""

from __future__ import annotations

import difflib
import hashlib
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pi0rl.errors import UserError
from pi0rl.files import read_json
from pi0rl.policy.lora import merged_state
from pi0rl.policy.policy import Policy

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Heads that another system's strict loader would refuse beside the network's weights.
HEADS = "pi0rl_heads.safetensors"
_NOT_WEIGHTS = ("policy_preprocessor", "policy_postprocessor", "adapter_model", "pi0rl_heads")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _network_files(directory: Path) -> list[Path]:
    """The safetensors files that hold the network: one, the shards of an index, or whatever shards lie there."""
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if (directory / INDEX).is_file():
        weight_map = read_json(directory / INDEX).get("weight_map")
        names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
        absent = [name for name in names if not (directory / name).is_file()]
        if absent or not names:
            lost = absent[0] if absent else "a weight_map"
            raise UserError(f"{directory / INDEX}: {lost} is missing ({len(names)} shards named); download it again")
        return [directory / name for name in names]
    return sorted(f for f in directory.glob("*.safetensors") if not f.name.startswith(_NOT_WEIGHTS))


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of the network and of heads stored beside them; a UserError where there are none."""
    files = _network_files(directory)
    if not files:
        raise UserError(_no_weights(directory))
    return [*files, directory / HEADS] if (directory / HEADS).is_file() else files


def read_safetensors(directory: Path) -> dict[str, Tensor]:
    """All weights of ``directory`` (one file or shards, and heads stored beside them), memory mapped."""
    tensors: dict[str, Tensor] = {}
    for file in weight_files(directory):
        for name, tensor in read_tensors(file).items():
            if name in tensors:
                raise UserError(f"{file}: weight {name} is in another shard too; remove the stale file")
            tensors[name] = tensor
    return tensors


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, memory mapped."""
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: {_unreadable(file, error)}") from error


def tensor_shapes(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> dtype (BF16, F32, ...) and shape, from the file's header alone."""
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: {_unreadable(file, error)}") from error


def _unreadable(file: Path, error: Exception) -> str:
    with file.open("rb") as stream:
        start = stream.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, expected the weights themselves; run git lfs pull where it was cloned"
    if start.startswith((b"PK", b"\x80")):
        return "a pickle, expected safetensors; RLinf's belongs in model_state_dict/full_weights.pt"
    return f"not a readable safetensors file ({error}), truncated or foreign; copy or download it again"


def _no_weights(directory: Path) -> str:
    """Why there are no weights, as far as one can see."""
    if (directory / "adapter_config.json").is_file():
        return f"{directory}: a LoRA adapter, expected whole weights; merge it into its base model first"
    if any((directory / name).exists() for name in ("params/_METADATA", "_METADATA", "params/manifest.ocdbt")):
        return (
            f"{directory}: openpi's JAX checkpoint, expected {SINGLE}; convert it with openpi's "
            "examples/convert_jax_model_to_pytorch.py first"
        )
    return f"{directory}: no *.safetensors file; expected {SINGLE} or its shards"


def write_safetensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors straight from where they lie (a memory map, perhaps): no second copy in memory."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, mostly, which others report as an OSError
        cause = re.search(r"os error (\d+)", str(error))
        if cause is None:
            raise
        raise OSError(int(cause[1]), os.strerror(int(cause[1])), str(file)) from error
    file.chmod(0o644)  # safetensors makes files private


def policy_tensors(policy: Policy) -> dict[str, Tensor]:
    """The policy's tensors under openpi's and RLinf's names, on the CPU; adapters are merged."""
    # not its state_dict: that would take apart what several actors share, see pi0rl.cluster.sharding
    own = {**dict(policy.named_parameters()), **dict(policy.named_buffers())}
    state = own if policy.lora_rank is None else merged_state(policy)
    return {name.removeprefix("model."): tensor.detach().cpu() for name, tensor in state.items()}


def assign(policy: Policy, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Make ``tensors`` (openpi's names) the policy's weights without copying them, in the dtype they have.

    Only float16 is widened to float32, which holds all of its numbers: masked attention leaves float16's range.
    A UserError names the first missing, unknown, misshapen or non-float weight, and what is the likely cause.
    """
    own = {name.removeprefix("model."): name for name in policy.state_dict()}
    shapes = {short: tuple(policy.state_dict()[name].shape) for short, name in own.items()}
    advice = _advice(policy, tensors)
    missing = [name for name in own if name not in tensors]
    if missing:
        name, near = missing[0], difflib.get_close_matches(missing[0], [t for t in tensors if t not in own], 1, 0.8)
        got = f"got {near[0]}" if near else "got no such key"
        more = f" ({len(missing)} weights are missing)" if len(missing) > 1 else ""
        raise UserError(
            f"{source}: weight {name} is missing, expected shape {list(shapes[name])}, {got}{more}; {advice}"
        )
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise UserError(f"{source}: weight {name} has shape {list(tensor.shape)}, expected {list(shape)}; {advice}")
        if tensor.dtype not in _FLOATS:
            raise UserError(
                f"{source}: weight {name} has dtype {_short(tensor.dtype)}, expected float32, bfloat16 or float16; "
                "quantised weights cannot be trained, take the original ones"
            )
    unknown = sorted(set(tensors) - set(own))
    if unknown:
        raise UserError(
            f"{source}: {len(unknown)} unknown weights, the first is {unknown[0]} {list(tensors[unknown[0]].shape)}, "
            f"expected none; {advice}"
        )
    state = {own[name]: tensor.float() if tensor.dtype == torch.float16 else tensor for name, tensor in tensors.items()}
    policy.load_state_dict(state, strict=False, assign=True)


def _advice(policy: Policy, tensors: Mapping[str, Tensor]) -> str:
    """What to do about weights that do not fit."""
    if any(".lora_" in name for name in tensors):
        return "these are LoRA weights: merge them into their base model first"
    if ("time_mlp_in.weight" in tensors) != policy.config.pi05:
        theirs, wanted = ("pi0.5", "pi0") if "time_mlp_in.weight" in tensors else ("pi0", "pi0.5")
        return f"these are weights of {theirs}, expected {wanted}: take the checkpoint of the right variant"
    return "is this the right variant and size, and downloaded completely?"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def parameter_count(shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """Numbers in all tensors together."""
    return sum(math.prod(shape) for _, shape in shapes.values())


def sha256(file: Path) -> str:
    """Hex digest of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
