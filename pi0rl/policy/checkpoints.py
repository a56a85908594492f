"""Loading any checkpoint; our own is ``model.safetensors`` and ``config.json`` (architecture, processing, digest)."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file

from pi0rl.errors import UserError
from pi0rl.files import replace_directory
from pi0rl.policy.config import Pi0Config
from pi0rl.policy.critic import CriticConfig, NoiseHeadConfig
from pi0rl.policy.foreign import load_openpi
from pi0rl.policy.lerobot import load_lerobot
from pi0rl.policy.policy import Policy
from pi0rl.policy.processing import Normalisation, Processing
from pi0rl.policy.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer, WordTokenizer
from pi0rl.policy.weights import assign, policy_tensors, read_json, read_safetensors, sha256

FORMAT = "pi0rl"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
_SENTENCEPIECE, _HUGGINGFACE = "tokenizer.model", "tokenizer.json"


def save_policy(policy: Policy, directory: Path) -> None:
    """Write the policy; ``directory`` appears complete or not at all, and replaces what was there."""
    with replace_directory(directory) as temporary:
        save_file({name: t.contiguous() for name, t in policy_tensors(policy).items()}, temporary / WEIGHTS)
        (temporary / WEIGHTS).chmod(0o644)  # safetensors makes files private
        tokenizer = _write_tokenizer(policy.processing.tokenizer, temporary)
        processing = {name: getattr(policy.processing, name) for name in Processing.__dataclass_fields__}
        config = {
            "format": FORMAT,
            "model": asdict(policy.config),
            "critic": None if policy.critic_config is None else asdict(policy.critic_config),
            "exploration": None if policy.noise_config is None else asdict(policy.noise_config),
            "processing": processing
            | {
                "tokenizer": tokenizer,
                "state_norm": asdict(policy.processing.state_norm),
                "action_norm": asdict(policy.processing.action_norm),
            },
            "weights_sha256": sha256(temporary / WEIGHTS),
        }
        (temporary / CONFIG).write_text(json.dumps(config, indent=1) + "\n")


def load_own(directory: Path) -> Policy:
    """Read what ``save_policy`` wrote, on the CPU; the digest of the weights is checked."""
    file = directory / CONFIG
    config = read_json(file)
    try:
        parts = (config["model"], config["processing"], config["critic"], config["exploration"])
        digest = config["weights_sha256"]
    except KeyError as error:
        raise UserError(f"{file}: key {error} is missing; expected a pi0rl checkpoint, save it again") from error
    if not (directory / WEIGHTS).is_file() or sha256(directory / WEIGHTS) != digest:
        raise UserError(f"{directory / WEIGHTS}: missing, truncated or changed since it was saved; copy it again")
    try:
        model = TypeAdapter(Pi0Config).validate_python(parts[0])
        processing = _read_processing(parts[1], directory)
        critic = TypeAdapter(CriticConfig | None).validate_python(parts[2])
        exploration = TypeAdapter(NoiseHeadConfig | None).validate_python(parts[3])
    except (ValidationError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a valid pi0rl configuration ({' '.join(str(error).split())})") from error
    with torch.device("meta"):
        policy = Policy(model, processing, critic, exploration)
    assign(policy, read_safetensors(directory), directory / WEIGHTS)
    return policy


def _read_processing(stored: dict[str, Any], directory: Path) -> Processing:
    norm = TypeAdapter(Normalisation)
    return Processing(
        **stored
        | {
            "tokenizer": _read_tokenizer(stored["tokenizer"], directory),
            "state_norm": norm.validate_python(stored["state_norm"]),
            "action_norm": norm.validate_python(stored["action_norm"]),
        }
    )


def _write_tokenizer(tokenizer: Tokenizer, directory: Path) -> dict[str, Any]:
    if isinstance(tokenizer, WordTokenizer):
        return {"kind": "words", "words": tokenizer.words}
    if isinstance(tokenizer, SentencePieceTokenizer):
        (directory / _SENTENCEPIECE).write_bytes(tokenizer.model)
        return {"kind": "sentencepiece"}
    if isinstance(tokenizer, HuggingFaceTokenizer):
        (directory / _HUGGINGFACE).write_text(tokenizer.definition)
        return {"kind": "huggingface"}
    raise TypeError(f"no storage for tokenizer {type(tokenizer).__name__}")


def _read_tokenizer(stored: dict[str, Any], directory: Path) -> Tokenizer:
    if stored["kind"] == "words":
        return WordTokenizer(tuple(stored["words"]))
    if stored["kind"] == "sentencepiece":
        return SentencePieceTokenizer((directory / _SENTENCEPIECE).read_bytes())
    return HuggingFaceTokenizer((directory / _HUGGINGFACE).read_text())


def load_policy(source: str | Path, assets: Path | None = None) -> Policy:
    """Load a policy of any known format, on the CPU.

    Args:
        source: a directory (pi0rl, openpi, RLinf or LeRobot layout), or a hub id with revision, ``org/name@revision``.
        assets: directory with norm_stats.json and tokenizer, where an openpi or RLinf checkpoint lacks them.
    """
    directory = Path(source) if Path(source).is_dir() else _download(str(source))
    described = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}
    if described.get("format") == FORMAT:
        return load_own(directory)
    if described.get("type") in ("pi0", "pi05"):
        return load_lerobot(directory)
    if "type" in described:
        raise UserError(f"{directory / CONFIG}: policy type {described['type']}, expected pi0 or pi05")
    return load_openpi(directory, assets)


def _download(source: str) -> Path:
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)@([\w./-]+)", source)
    if match is None:
        raise UserError(f"{source}: no such checkpoint directory; expected a directory or a hub id org/name@revision")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*full_weights.pt"]
        return Path(snapshot_download(match[1], revision=match[2], allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{source}: not available from the hub ({reason}); check id, revision and network") from error
