"""Our own checkpoint: ``model.safetensors`` and ``config.json`` (architecture, processing, statistics, digest)."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file

from pi0rl.errors import UserError
from pi0rl.policy.config import Pi0Config
from pi0rl.policy.critic import CriticConfig, NoiseHeadConfig
from pi0rl.policy.policy import Policy
from pi0rl.policy.processing import Normalisation, Processing
from pi0rl.policy.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer, WordTokenizer
from pi0rl.policy.weights import assign, policy_tensors, read_safetensors, replaced_directory, sha256

FORMAT = "pi0rl"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
_SENTENCEPIECE, _HUGGINGFACE = "tokenizer.model", "tokenizer.json"


def save_policy(policy: Policy, directory: Path) -> None:
    """Write the policy; ``directory`` appears complete or not at all, and replaces what was there."""
    with replaced_directory(directory) as temporary:
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
    assign(policy, read_safetensors(directory), directory / WEIGHTS, heads_optional=False)
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


def load_policy(source: str | Path) -> Policy:
    """Load a policy from a directory."""
    directory = Path(source)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such checkpoint directory")
    return load_own(directory)
