"""Where the golden fixtures are, and what the tests of the network and of its processing share."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pi0rl.policy.config import Pi0Config, TransformerConfig, VisionConfig
from pi0rl.policy.foreign import canonical
from pi0rl.policy.model import ModelInputs, Pi0

_TESTS = Path(__file__).parent
_SHARED = _TESTS / "../../shared/golden/public"
GOLDEN = Path(os.environ.get("PI0RL_GOLDEN", _SHARED if _SHARED.is_dir() else _TESTS / "golden"))
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


def folders(*files: str) -> list:
    """One test parameter per folder of the set that holds all ``files``; a skipped one where there is none."""
    found = sorted(path.parent for path in GOLDEN.rglob(files[0]) if all((path.parent / f).is_file() for f in files))
    return parameters(found)


def parameters(paths: list[Path]) -> list:
    absent = pytest.param(GOLDEN, marks=pytest.mark.skip(reason=f"no such fixture in {GOLDEN}; set PI0RL_GOLDEN"))
    return [pytest.param(path, id=str(path.relative_to(GOLDEN))) for path in paths] or [absent]


def read_json(file: Path) -> dict:
    return json.loads(file.read_text())


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
        pi05="time_mlp_in.weight" in load_file(folder / "model.safetensors"),
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


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance, check_dtype=False)
