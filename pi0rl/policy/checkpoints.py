"""Loading any checkpoint; our own is ``model.safetensors`` and ``config.json`` (architecture, processing, digest)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pi0rl.errors import UserError
from pi0rl.files import replace_directory
from pi0rl.policy.description import FORMAT, describe, read_description, write_tokenizer
from pi0rl.policy.export import SIDECAR, load_exported
from pi0rl.policy.foreign import load_openpi, rlinf_weights
from pi0rl.policy.lerobot import load_lerobot
from pi0rl.policy.policy import Policy
from pi0rl.policy.sources import resolve
from pi0rl.policy.weights import (
    SINGLE,
    assign,
    policy_tensors,
    read_json,
    read_tensors,
    sha256,
    weight_files,
    write_safetensors,
)

CONFIG = "config.json"

Layout = Literal["pi0rl", "lerobot", "rlinf", "openpi"]


def save_policy(policy: Policy, directory: Path) -> None:
    """Write the policy; ``directory`` appears complete or not at all, and replaces what was there."""
    with replace_directory(directory) as temporary:
        write_safetensors(temporary / SINGLE, policy_tensors(policy))
        config = describe(policy, write_tokenizer(policy.processing.tokenizer, temporary))
        config["weights_sha256"] = sha256(temporary / SINGLE)
        (temporary / CONFIG).write_text(json.dumps(config, indent=1) + "\n")


def load_own(directory: Path) -> Policy:
    """Read what ``save_policy`` wrote, on the CPU; the digest of the weights is checked."""
    digest = read_json(directory / CONFIG).get("weights_sha256")
    if digest is None:
        raise UserError(f"{directory / CONFIG}: weights_sha256 is missing, expected a digest; save the policy again")
    if not (directory / SINGLE).is_file() or sha256(directory / SINGLE) != digest:
        raise UserError(f"{directory / SINGLE}: missing, truncated or changed since it was saved; copy it again")
    policy = read_description(directory / CONFIG).empty_policy()
    assign(policy, read_tensors(directory / SINGLE), directory / SINGLE)
    return policy


def layout_of(directory: Path) -> Layout:
    """Whose checkpoint this is, by its files; a UserError where it is nobody's we know."""
    described = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}
    if described.get("format") == FORMAT:
        return "pi0rl"
    if described.get("type") in ("pi0", "pi05"):
        return "lerobot"
    if "type" in described:
        raise UserError(f"{directory / CONFIG}: type is {described['type']}, expected pi0 or pi05")
    return "openpi" if rlinf_weights(directory) is None else "rlinf"


def weights_of(directory: Path, layout: Layout) -> list[Path]:
    """The files a checkpoint's weights are read from: one, or shards and heads.

    Raises:
        UserError: there are none, or one that the index names is missing.
    """
    rlinf = rlinf_weights(directory) if layout == "rlinf" else None
    return weight_files(directory) if rlinf is None else [rlinf]


def joint_digest(digests: Mapping[str, str]) -> str:
    """One sha256 of files, given name -> sha256: the only one's; of several, that of sha256sum's lines, by name."""
    if len(digests) == 1:
        return next(iter(digests.values()))
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def load_policy(source: str | Path, assets: Path | None = None, statistics: bool = True) -> Policy:
    """Load a policy of any known layout, on the CPU, memory mapped, in the dtypes it is stored in.

    Args:
        source: a directory (pi0rl, openpi, RLinf or LeRobot layout), or what ``sources.resolve`` understands.
        assets: directory with norm_stats.json and tokenizer, where an openpi or RLinf checkpoint lacks them, or with
            the tokenizer, where a LeRobot checkpoint does.
        statistics: False where the caller puts in others: openpi's, RLinf's and LeRobot's layouts need not have any,
            as a base model has none of LIBERO, and leave them empty.
    """
    directory = resolve(str(source)).directory
    layout = layout_of(directory)
    if layout == "pi0rl":
        return load_own(directory)
    if (directory / SIDECAR).is_file():
        return load_exported(directory)
    load = load_lerobot if layout == "lerobot" else load_openpi
    return load(directory, assets, statistics=statistics)
