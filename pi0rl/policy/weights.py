"""Tensors on disk: reading safetensors by memory map, checking them against a policy, writing atomically."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pi0rl.errors import UserError
from pi0rl.policy.policy import Policy


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, or a UserError that names the file."""
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{file}: not found; expected a checkpoint directory with this file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable as JSON ({error}); copy or download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def read_safetensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of all ``*.safetensors`` weight files in ``directory`` (one, or shards), memory mapped."""
    single = directory / "model.safetensors"
    files = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"{directory}: no *.safetensors file; expected model.safetensors or its shards")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors.update(load_file(file))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: not a readable safetensors file ({error}); copy or download it again") from error
    return tensors


def policy_tensors(policy: Policy) -> dict[str, Tensor]:
    """The policy's tensors under openpi's and RLinf's names, on the CPU."""
    return {name.removeprefix("model."): tensor.detach().cpu() for name, tensor in policy.state_dict().items()}


def assign(policy: Policy, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Make ``tensors`` (openpi's names) the policy's weights without copying them, in the dtype they have.

    A UserError names the first missing, unknown or misshapen key.
    """
    own = {name.removeprefix("model."): name for name in policy.state_dict()}
    for name, tensor in policy.state_dict().items():
        short = name.removeprefix("model.")
        if short not in tensors:
            raise UserError(f"{source}: weight {short} {list(tensor.shape)} is missing; is this the right variant?")
        if tensors[short].shape != tensor.shape:
            raise UserError(
                f"{source}: weight {short} has shape {list(tensors[short].shape)}, expected {list(tensor.shape)}; "
                "is this the right variant?"
            )
    unknown = sorted(set(tensors) - set(own))
    if unknown:
        raise UserError(
            f"{source}: {len(unknown)} unknown weights, the first is {unknown[0]}; is this the right variant?"
        )
    policy.load_state_dict({own[name]: tensor for name, tensor in tensors.items()}, strict=False, assign=True)


def sha256(file: Path) -> str:
    """Hex digest of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
