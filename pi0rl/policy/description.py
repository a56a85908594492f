"""What a checkpoint says about itself besides the weights: architecture, heads, processing, tokenizer. As JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from pi0rl.errors import UserError
from pi0rl.policy.config import PI0, Pi0Config
from pi0rl.policy.critic import CriticConfig, NoiseHeadConfig
from pi0rl.policy.policy import Policy
from pi0rl.policy.processing import Normalisation, Processing
from pi0rl.policy.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer, WordTokenizer
from pi0rl.policy.weights import read_json

FORMAT = "pi0rl"
SENTENCEPIECE, HUGGINGFACE = "tokenizer.model", "tokenizer.json"


@dataclass(frozen=True)
class Description:
    """Everything about a policy but its weights."""

    model: Pi0Config
    processing: Processing
    critic: CriticConfig | None = None
    exploration: NoiseHeadConfig | None = None

    def empty_policy(self) -> Policy:
        """The policy without memory for its weights, which are to be assigned."""
        with torch.device("meta"):
            return Policy(self.model, self.processing, self.critic, self.exploration)


def variant_name(config: Pi0Config) -> str:
    """What params call it (``actor.model.variant``): pi0 or pi05 at full size, else tiny."""
    if (config.vision, config.text, config.expert) != (PI0.vision, PI0.text, PI0.expert):
        return "tiny"
    return "pi05" if config.pi05 else "pi0"


def check_variant(config: Pi0Config, expected: str, location: str) -> None:
    """Refuse a checkpoint from ``location`` that is not of the variant in the params."""
    got = variant_name(config)
    if got != expected:
        raise UserError(
            f"{location}: the checkpoint is {got}, expected actor.model.variant {expected}; set the variant to {got} "
            "or name another checkpoint"
        )


def describe(policy: Policy, tokenizer_file: str | None) -> dict[str, Any]:
    """The policy's description as JSON; ``tokenizer_file`` is where the tokenizer lies, beside it (see there)."""
    processing = {name: getattr(policy.processing, name) for name in Processing.__dataclass_fields__}
    return {
        "format": FORMAT,
        "model": asdict(policy.config),
        "critic": None if policy.critic_config is None else asdict(policy.critic_config),
        "exploration": None if policy.noise_config is None else asdict(policy.noise_config),
        "processing": processing
        | {
            "tokenizer": _tokenizer_entry(policy.processing.tokenizer, tokenizer_file),
            "state_norm": asdict(policy.processing.state_norm),
            "action_norm": asdict(policy.processing.action_norm),
        },
    }


def read_description(file: Path) -> Description:
    """What ``describe`` wrote; a UserError names what is wrong with it."""
    stored = read_json(file)
    missing = {"model", "processing", "critic", "exploration"} - set(stored)
    if missing:
        raise UserError(
            f"{file}: key {min(missing)} is missing; expected the description of a pi0rl checkpoint, save it again"
        )
    try:
        return Description(
            TypeAdapter(Pi0Config).validate_python(stored["model"]),
            _read_processing(stored["processing"], file.parent),
            TypeAdapter(CriticConfig | None).validate_python(stored["critic"]),
            TypeAdapter(NoiseHeadConfig | None).validate_python(stored["exploration"]),
        )
    except (ValidationError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a valid pi0rl configuration ({' '.join(str(error).split())})") from error


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


def write_tokenizer(tokenizer: Tokenizer, directory: Path, folder: str = "") -> str | None:
    """Write the tokenizer's file below ``directory``; its relative name, or None for the built-in one."""
    if isinstance(tokenizer, WordTokenizer):
        return None
    (directory / folder).mkdir(exist_ok=True)
    if isinstance(tokenizer, SentencePieceTokenizer):
        name = str(Path(folder) / SENTENCEPIECE)
        (directory / name).write_bytes(tokenizer.model)
        return name
    if isinstance(tokenizer, HuggingFaceTokenizer):
        name = str(Path(folder) / HUGGINGFACE)
        (directory / name).write_text(tokenizer.definition)
        return name
    raise TypeError(f"no storage for tokenizer {type(tokenizer).__name__}")


def _tokenizer_entry(tokenizer: Tokenizer, file: str | None) -> dict[str, Any]:
    if isinstance(tokenizer, WordTokenizer):
        return {"kind": "words", "words": tokenizer.words}
    kind = "sentencepiece" if isinstance(tokenizer, SentencePieceTokenizer) else "huggingface"
    return {"kind": kind, "file": file}


def _read_tokenizer(stored: dict[str, Any], directory: Path) -> Tokenizer:
    if stored["kind"] == "words":
        return WordTokenizer(tuple(stored["words"]))
    sentencepiece = stored["kind"] == "sentencepiece"
    file = directory / stored.get("file", SENTENCEPIECE if sentencepiece else HUGGINGFACE)
    if not file.is_file():
        raise UserError(f"{file}: not found, but the checkpoint's tokenizer is there; copy the whole checkpoint")
    return SentencePieceTokenizer(file.read_bytes()) if sentencepiece else HuggingFaceTokenizer(file.read_text())
