"""Reading openpi's and RLinf's checkpoints: names, sizes from shapes, statistics, and what LIBERO's configs imply."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pi0rl.errors import UserError, first_line
from pi0rl.policy.config import Pi0Config, TransformerConfig, VisionConfig
from pi0rl.policy.critic import CriticConfig, NoiseHeadConfig
from pi0rl.policy.policy import Policy
from pi0rl.policy.processing import ENV_ACTION_DIM, Normalisation, Processing
from pi0rl.policy.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from pi0rl.policy.weights import assign, read_json, read_safetensors

_VLM = "paligemma_with_expert.paligemma."
_VISION = _VLM + "model.vision_tower.vision_model."
_TEXT = _VLM + "model.language_model."
_EXPERT = "paligemma_with_expert.gemma_expert."
EMBEDDING = _TEXT + "embed_tokens.weight"
TIED_EMBEDDING = _VLM + "lm_head.weight"
UNUSED_HEAD = _EXPERT + "lm_head.weight"

NORM_STATS = "physical-intelligence/libero/norm_stats.json"
RLINF_WEIGHTS = ("model_state_dict/full_weights.pt", "actor/model_state_dict/full_weights.pt", "full_weights.pt")
_TOKENIZERS = ("paligemma_tokenizer.model", "tokenizer.model", "tokenizer/tokenizer.model", "tokenizer/tokenizer.json")
_TOKENIZERS += ("tokenizer.json",)
# SigLIP So400m has 72 features per head; the number of heads cannot be seen in the shapes.
_SIGLIP_HEAD_DIM = 72


def canonical(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Foreign weights under our names: one token embedding, no unused expert head.

    openpi stores the tied embedding as ``lm_head``; where a file holds both (LeRobot no longer ties them),
    ``embed_tokens`` is the one the network reads.
    """
    result = {name: tensor for name, tensor in tensors.items() if name not in (TIED_EMBEDDING, UNUSED_HEAD)}
    if EMBEDDING not in result and TIED_EMBEDDING in tensors:
        result[EMBEDDING] = tensors[TIED_EMBEDDING]
    return result


def whole_number(file: Path, key: str, value: object) -> int:
    """``value`` if it is a positive whole number, or a UserError that names ``key`` of ``file``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{file}: {key} is {value!r}, expected a positive whole number; download it again")
    return value


def _shape(tensors: Mapping[str, Tensor], name: str, dims: int, source: Path) -> torch.Size:
    if name not in tensors:
        raise UserError(
            f"{source}: weight {name} is missing, expected it in every pi0 and pi0.5, got {len(tensors)} others, the "
            f"first is {min(tensors, default='none')}; is this a whole checkpoint of a pi0?"
        )
    shape = tensors[name].shape
    if len(shape) != dims:
        raise UserError(
            f"{source}: weight {name} has shape {list(shape)}, expected {dims} dimensions; is it openpi's for PyTorch?"
        )
    return shape


def _depth(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix)})


def _stack(tensors: Mapping[str, Tensor], prefix: str, source: Path) -> TransformerConfig:
    """Sizes of a Gemma stack; one key head, as in every released pi0."""
    first = prefix + "layers.0."
    head_dim, width = _shape(tensors, first + "self_attn.k_proj.weight", 2, source)
    return TransformerConfig(
        width=width,
        depth=_depth(tensors, prefix + "layers."),
        mlp_dim=_shape(tensors, first + "mlp.gate_proj.weight", 2, source)[0],
        num_heads=_shape(tensors, first + "self_attn.q_proj.weight", 2, source)[0] // head_dim,
        num_kv_heads=1,
        head_dim=head_dim,
    )


def infer_config(tensors: Mapping[str, Tensor], action_horizon: int | None, source: Path) -> Pi0Config:
    """Architecture from canonical weights; ``action_horizon`` leaves no trace in them (default: pi0 50, pi0.5 10)."""
    width, _, patch, _ = _shape(tensors, _VISION + "embeddings.patch_embedding.weight", 4, source)
    patches = _shape(tensors, _VISION + "embeddings.position_embedding.weight", 2, source)[0]
    if width % _SIGLIP_HEAD_DIM:
        raise UserError(
            f"{source}: vision width is {width}, expected SigLIP So400m's 1152 (a multiple of 72); other "
            "sizes are read only with the pi0rl.json that pi0rl writes beside them"
        )
    vision = VisionConfig(
        width=width,
        depth=_depth(tensors, _VISION + "encoder.layers."),
        mlp_dim=_shape(tensors, _VISION + "encoder.layers.0.mlp.fc1.weight", 2, source)[0],
        num_heads=width // _SIGLIP_HEAD_DIM,
        patch_size=patch,
        image_size=math.isqrt(patches) * patch,
    )
    pi05 = "time_mlp_in.weight" in tensors
    action_dim = _shape(tensors, "action_in_proj.weight", 2, source)[1]
    return Pi0Config(
        vision=vision,
        text=_stack(tensors, _TEXT, source),
        expert=_stack(tensors, _EXPERT + "model.", source),
        vocab_size=_shape(tensors, EMBEDDING, 2, source)[0],
        max_token_len=200 if pi05 else 48,
        action_dim=action_dim,
        state_dim=action_dim if pi05 else _shape(tensors, "state_proj.weight", 2, source)[1],
        action_horizon=action_horizon or (10 if pi05 else 50),
        pi05=pi05,
    )


def _hidden(tensors: Mapping[str, Tensor], head: str) -> tuple[int, ...]:
    """Hidden widths of an MLP head: rows of all its biases but the last."""
    return tuple(len(tensors[name]) for name in sorted(tensors) if name.startswith(head) and name.endswith(".bias"))[
        :-1
    ]


def infer_heads(
    tensors: Mapping[str, Tensor], config: Pi0Config, source: Path
) -> tuple[CriticConfig | None, NoiseHeadConfig | None]:
    """The heads a checkpoint of RLinf holds; a critic as wide as the VLM reads the prefix and is not detached."""
    critic = noise = None
    if "value_head.mlp.0.weight" in tensors:
        width = _shape(tensors, "value_head.mlp.0.weight", 2, source)[1]
        prefix = width == config.text.width and (config.pi05 or width != config.expert.width)
        critic = CriticConfig("prefix" if prefix else "expert", _hidden(tensors, "value_head."), detach=not prefix)
    if {"noise_head.logvar_min", "noise_head.logvar_max"} <= tensors.keys():
        # Six digits: float32 logarithms of 0.08 and 0.16 come back as these very numbers.
        low, high = (float(f"{math.exp(float(tensors[f'noise_head.logvar_{end}']) / 2):.6g}") for end in ("min", "max"))
        noise = NoiseHeadConfig((low, high), _hidden(tensors, "noise_head."))
    return critic, noise


def read_norm_stats(file: Path, quantiles: bool) -> tuple[Normalisation, Normalisation]:
    """State and action statistics of openpi's ``norm_stats.json``: mean and std, or the percentiles pi0.5 uses."""
    names = ("q01", "q99") if quantiles else ("mean", "std")
    stats = read_json(file).get("norm_stats")
    if not isinstance(stats, dict):
        got = "nothing" if stats is None else type(stats).__name__
        raise UserError(f"{file}: norm_stats is {got}, expected state and actions; take the file of its training run")
    parts = []
    for key, width in (("state", 8), ("actions", ENV_ACTION_DIM)):
        first, second = checked_statistics(file, f"norm_stats.{key}", stats.get(key), names, width)
        parts.append(Normalisation("quantile" if quantiles else "mean_std", first, second))
    return parts[0], parts[1]


def checked_statistics(
    file: Path, key: str, stats: Any, names: tuple[str, str], width: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The two statistics ``names`` of LIBERO's ``width`` dimensions; a UserError where they are missing or nonsense."""
    found, stats = [], stats if isinstance(stats, dict) else {}
    for name in names:
        values = stats.get(name)
        if not isinstance(values, list):
            raise UserError(
                f"{file}: {key}.{name} is missing, expected a list of at least {width} numbers, got "
                f"{sorted(stats) or 'nothing'}; this policy cannot act without it, take it from its training run"
            )
        numbers = all(isinstance(v, int | float) and math.isfinite(v) for v in values)
        if not numbers or len(values) < width:
            got = f"{len(values)} entries{'' if numbers else ', not all finite numbers'}"
            raise UserError(
                f"{file}: {key}.{name} has {got}, expected at least {width} for LIBERO; take the statistics of its "
                "training run"
            )
        found.append(tuple(float(value) for value in values))
    if len(found[0]) != len(found[1]):
        raise UserError(f"{file}: {key} has {len(found[0])} {names[0]} but {len(found[1])} {names[1]}; copy it again")
    return found[0], found[1]


def check_vocabulary(tokenizer: Tokenizer, config: Pi0Config, source: Path) -> Tokenizer:
    """The tokenizer, if the network embeds all of its ids."""
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} ids, expected at most the {config.vocab_size} the "
            "network embeds; put the tokenizer it was trained with beside the weights"
        )
    return tokenizer


def find_tokenizer(directories: list[Path]) -> Tokenizer:
    """The tokenizer beside a checkpoint; openpi's checkpoints do not hold theirs (PaliGemma's)."""
    for directory in directories:
        for name in _TOKENIZERS:
            file = directory / name
            if file.is_file():
                return (
                    HuggingFaceTokenizer(file.read_text())
                    if file.suffix == ".json"
                    else SentencePieceTokenizer(file.read_bytes())
                )
    where = " or ".join(str(directory) for directory in directories)
    raise UserError(f"{where}: no tokenizer; put PaliGemma's paligemma_tokenizer.model (or tokenizer.json) there")


def _find_norm_stats(directories: list[Path]) -> Path:
    for directory in directories:
        candidates = [directory / NORM_STATS, directory / "assets" / NORM_STATS, directory / "norm_stats.json"]
        candidates += sorted(directory.glob("assets/**/norm_stats.json"))
        for file in candidates:
            if file.is_file():
                return file
    where = " or ".join(str(directory) for directory in directories)
    raise UserError(
        f"{where}: no {NORM_STATS}, without which this policy cannot act; copy it from the checkpoint it was "
        "trained from, or train a base model on demonstrations first (sft.checkpoint)"
    )


def openpi_processing(
    config: Pi0Config,
    tokenizer: Tokenizer,
    norms: tuple[Normalisation, Normalisation],
    discrete_state_input: bool = False,
) -> Processing:
    """What openpi's and RLinf's ``pi0_libero`` and ``pi05_libero`` configs do.

    Neither spells the state out; openpi's other configs of pi0.5 do (``discrete_state_input``).
    """
    return Processing(
        image_size=config.vision.image_size,
        state_dim=config.state_dim,
        action_dim=config.action_dim,
        token_len=config.max_token_len,
        tokenizer=tokenizer,
        state_norm=norms[0],
        action_norm=norms[1],
        prompt_style="text_and_state" if discrete_state_input else "text",
        delta_actions=not config.pi05,
    )


def rlinf_weights(directory: Path) -> Path | None:
    """RLinf's ``full_weights.pt`` in or below ``directory``, if it is there."""
    return next((directory / name for name in RLINF_WEIGHTS if (directory / name).is_file()), None)


def read_full_weights(file: Path) -> dict[str, Tensor]:
    """RLinf's ``full_weights.pt``; nothing but tensors is unpickled."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise UserError(
            f"{file}: not a plain file of tensors, truncated or with code in it, so nothing was run "
            f"({first_line(error)}); copy it again, or save its state dict as safetensors where you trust it"
        ) from error
    if not isinstance(tensors, dict):
        raise UserError(f"{file}: expected a dictionary of tensors, got {type(tensors).__name__}; is it RLinf's?")
    strangers = [f"{name}: {type(value).__name__}" for name, value in tensors.items() if not isinstance(value, Tensor)]
    if strangers:
        raise UserError(f"{file}: expected tensors only, got {strangers[0]}; save the model's state dict alone")
    return tensors


def load_openpi(
    directory: Path, assets: Path | None = None, config: Pi0Config | None = None, statistics: bool = True
) -> Policy:
    """A checkpoint in openpi's PyTorch layout, or the one RLinf's runner writes, on the CPU in its own dtypes.

    Args:
        assets: where to look for norm_stats.json and the tokenizer besides ``directory``.
        config: the architecture, where it cannot be seen in the shapes.
        statistics: whether to read them; else they are empty, for the caller to put in.
    """
    rlinf = rlinf_weights(directory)
    source = rlinf or directory
    tensors = canonical(read_full_weights(rlinf) if rlinf else read_safetensors(directory))
    described = read_json(directory / "config.json") if (directory / "config.json").is_file() else {}
    if config is None:
        horizon = described.get("action_horizon")
        if horizon is not None:
            horizon = whole_number(directory / "config.json", "action_horizon", horizon)
        config = infer_config(tensors, horizon, source)
    critic, noise = infer_heads(tensors, config, source)
    places = [directory] if assets is None else [assets, directory]
    if statistics:
        norms = read_norm_stats(_find_norm_stats(places), quantiles=config.pi05)
    else:
        empty = Normalisation("quantile" if config.pi05 else "mean_std", (), ())
        norms = empty, empty
    tokenizer = check_vocabulary(find_tokenizer(places), config, directory)
    discrete_state_input = config.pi05 and bool(described.get("discrete_state_input"))
    processing = openpi_processing(config, tokenizer, norms, discrete_state_input)
    if critic is not None and critic.reads_padding:
        processing = replace(processing, absent_camera=True)
    with torch.device("meta"):
        policy = Policy(config, processing, critic, noise)
    assign(policy, tensors, source)
    return policy
