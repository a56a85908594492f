"""The golden fixtures: where they are, what is recognised by its layout, and what the tests of them share.

A set is a directory tree; a fixture is found by the files and keys it has, whatever its folder is called, and every
size is taken from it. What no layout claims is an error (``test_golden_complete``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pi0rl.policy.config import Pi0Config, TransformerConfig, VisionConfig
from pi0rl.policy.foreign import canonical
from pi0rl.policy.model import ModelInputs, Pi0

_TESTS = Path(__file__).parent
_SHARED = _TESTS.parent / "../shared/golden/public"
GOLDEN = Path(os.environ.get("PI0RL_GOLDEN", _SHARED if _SHARED.is_dir() else _TESTS / "golden")).resolve()
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


@dataclass(frozen=True)
class Fixture:
    """What a test takes: a folder, or the path of a case's ``.json`` and ``.safetensors`` without suffix."""

    kind: str
    path: Path
    files: frozenset[Path]


def read_json(file: Path) -> Any:
    return json.loads(file.read_text())


def with_suffix(case: Path, suffix: str) -> Path:
    """Case names hold dots (sde_0.5_train), so ``Path.with_suffix`` will not do."""
    return case.with_name(case.name + suffix)


@cache
def scan(root: Path) -> tuple[Fixture, ...]:
    """Every fixture under ``root`` that some layout recognises."""
    folders = sorted({path.parent for path in root.rglob("*") if path.is_file()})
    return tuple(fixture for folder in folders for fixture in (*_of_folder(folder), *_cases(folder)))


def _of_folder(folder: Path) -> Iterator[Fixture]:
    """Fixtures that fill a folder."""

    def fixture(kind: str, *patterns: str) -> Fixture:
        return Fixture(kind, folder, frozenset(f for p in patterns for f in folder.glob(p) if f.is_file()))

    def has(*names: str) -> bool:
        return all((folder / name).is_file() for name in names)

    if has("model.safetensors", "config.json", "inputs.safetensors", "outputs.safetensors"):
        yield fixture("network", "model.safetensors", "config.json", "inputs.safetensors", "outputs.safetensors")
        if has("grads.safetensors", "grad_norms.json"):
            yield fixture("gradients", "grads.safetensors", "grad_norms.json")
        if has("outputs_bf16.safetensors", "dtypes_bf16.json"):
            yield fixture("bf16", "outputs_bf16.safetensors", "dtypes_bf16.json")
    if has("keys.json", "config.json", "outputs.safetensors"):
        yield fixture("lerobot_network", "keys.json", "config.json", "outputs.safetensors", "model.safetensors")
    if has("policy_preprocessor.json", "policy_postprocessor.json", "io.safetensors"):
        own = ("policy_*", "config.json", "io.safetensors", "io.json", "tokenizer/*")
        yield fixture("lerobot_processor", *own)
    if has("io.npz", "io.json"):
        with np.load(folder / "io.npz") as arrays:
            kind = "libero_io" if "raw.agentview_image" in arrays else "libero_io_pi05"
        yield fixture(kind, "io.npz", "io.json", "*.model", "assets/**/norm_stats.json")
    if has("io.safetensors", "model.safetensors", "config.json"):
        yield fixture("vlm_value", "io.safetensors", "model.safetensors", "config.json")


def _cases(folder: Path) -> Iterator[Fixture]:
    """Fixtures of which a folder holds many, told apart by what their JSON says."""
    for file in sorted(folder.glob("*.json")):
        content, stem = read_json(file), file.with_name(file.name.removesuffix(".json"))
        arrays = with_suffix(stem, ".safetensors")
        if isinstance(content, list) and content and "lr_scheduler" in content[0]:
            yield Fixture("learning_rates", file, frozenset({file}))
        if not isinstance(content, dict) or not arrays.is_file():
            continue
        files = {file, arrays}
        if "case" in content and "gamma" in content:
            yield Fixture("advantages", stem, frozenset(files))
        elif "options" in content and "metrics" in content:
            yield Fixture("losses", stem, frozenset(files))
        elif "per_optimizer_step" in content:
            yield Fixture("train_step", stem, frozenset(files))
        elif "python_random_seed" in content and (folder / "heads.safetensors").is_file():
            network = ("heads.safetensors", "model.safetensors", "config.json", "inputs.safetensors")
            files |= {folder / name for name in network} | {with_suffix(stem, ".gradnorms.json")}
            yield Fixture("sampler", stem, frozenset(f for f in files if f.is_file()))
        elif "masked_mean" in keys(arrays):
            yield Fixture("small_functions", stem, frozenset(files))


def keys(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def fixtures(kind: str) -> list:
    """One test parameter per fixture of that kind; a skipped one where the set has none."""
    found = [fixture.path for fixture in scan(GOLDEN) if fixture.kind == kind]
    absent = pytest.param(GOLDEN, marks=pytest.mark.skip(reason=f"no {kind} fixture in {GOLDEN}; set PI0RL_GOLDEN"))
    return [pytest.param(path, id=str(path.relative_to(GOLDEN))) for path in found] or [absent]


def nearest(candidates: list[Path], to: Path, what: str) -> Path:
    """The candidate with the most folders in common; a fixture's network is stored beside it, once for many cases."""
    if not candidates:
        pytest.fail(f"{to}: {what} is not in the set")
    return max(sorted(candidates), key=lambda path: len(os.path.commonpath((path, to))))


def network_of(folder: Path, pi05: bool) -> Path:
    """Folder of the network and inputs that belong to ``folder``'s cases: itself, or the nearest of that variant."""
    if (folder / "model.safetensors").is_file() and (folder / "inputs.safetensors").is_file():
        return folder
    networks = [f.path for f in scan(GOLDEN) if f.kind == "network" and is_pi05(f.path) == pi05]
    return nearest(networks, folder, f"the {'pi0.5' if pi05 else 'pi0'} network it was computed with")


def is_pi05(folder: Path) -> bool:
    return "time_mlp_in.weight" in keys(folder / "model.safetensors")


def architecture(folder: Path) -> Pi0Config:
    """The architecture a fixture's config.json describes; pi0.5 is recognised by its weights."""
    sizes = read_json(folder / "config.json")["sizes"]
    vision = sizes["vision"]
    return Pi0Config(
        vision=VisionConfig(
            width=vision["hidden_size"],
            depth=vision["num_hidden_layers"],
            mlp_dim=vision["intermediate_size"],
            num_heads=vision["num_attention_heads"],
            patch_size=vision["patch_size"],
            image_size=vision["image_size"],
        ),
        text=TransformerConfig(**sizes["text"]),
        expert=TransformerConfig(**sizes["expert"]),
        vocab_size=sizes["vocab"],
        max_token_len=sizes["max_token_len"],
        action_dim=sizes["action_dim"],
        state_dim=sizes["action_dim"],
        action_horizon=sizes["action_horizon"],
        pi05=is_pi05(folder),
    )


def network(folder: Path) -> Pi0:
    """The fixture's network with its weights."""
    model = Pi0(architecture(folder))
    weights = canonical(load_file(folder / "model.safetensors"))
    model.load_state_dict({name: tensor for name, tensor in weights.items() if not name.startswith("value_head.")})
    return model


def model_inputs(arrays: dict[str, Tensor]) -> ModelInputs:
    """Inputs as openpi's fixtures name them; images float, or uint8 with channels last."""
    if f"images.{CAMERAS[0]}" in arrays:
        images = [arrays[f"images.{camera}"] for camera in CAMERAS]
    else:
        images = [arrays[f"images_uint8.{camera}"].permute(0, 3, 1, 2) / 255.0 * 2.0 - 1.0 for camera in CAMERAS]
    return ModelInputs(
        images=torch.stack(images, dim=1),
        image_mask=torch.stack([arrays[f"image_masks.{camera}"] for camera in CAMERAS], dim=1),
        tokens=arrays["tokenized_prompt"],
        token_mask=arrays["tokenized_prompt_mask"],
        state=arrays["state"],
    )


def hidden_widths(heads: dict[str, Tensor], prefix: str) -> tuple[int, ...]:
    """Widths of an MLP head's hidden layers."""
    return tuple(len(heads[n]) for n in sorted(heads) if n.startswith(prefix) and n.endswith(".bias"))[:-1]


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance, check_dtype=False)
