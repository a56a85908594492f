"""Images, states, prompts and actions against openpi, RLinf and LeRobot; LeRobot's checkpoints against the network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_files import architecture, close, folders, model_inputs, read_json
from safetensors.torch import load_file

from pi0rl.observation import Observation
from pi0rl.policy.config import PI0, PI05
from pi0rl.policy.foreign import NORM_STATS, openpi_processing, read_norm_stats
from pi0rl.policy.lerobot import lerobot_weights, read_normalisations
from pi0rl.policy.model import Pi0
from pi0rl.policy.processing import Normalisation, Processing, resize_pil, resize_torch
from pi0rl.policy.tokenizer import SentencePieceTokenizer, prompt_text, state_bins

pytestmark = pytest.mark.golden

PI0_IO = [p for p in folders("io.npz", "io.json", "tiny_tokenizer.model") if not str(p.id or "").endswith("pi05")]
PI05_IO = [p for p in folders("io.npz", "io.json", "tiny_tokenizer.model") if str(p.id or "").endswith("pi05")]


def processing_of(folder: Path, pi05: bool) -> Processing:
    norms = read_norm_stats(folder / "assets" / NORM_STATS, quantiles=pi05)
    tokenizer = SentencePieceTokenizer((folder / "tiny_tokenizer.model").read_bytes())
    return openpi_processing(PI05 if pi05 else PI0, tokenizer, norms)


@pytest.mark.parametrize("folder", PI0_IO)
def test_openpi_libero(folder: Path) -> None:
    arrays, described = np.load(folder / "io.npz"), read_json(folder / "io.json")
    processing = replace(processing_of(folder, pi05=False), absent_camera=True)
    observation = Observation(
        arrays["raw.agentview_image"],
        arrays["raw.robot0_eye_in_hand_image"],
        arrays["env.state"],
        tuple(described["prompts"]),
    )
    inputs = processing.inputs(observation)
    for index, camera in enumerate(("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")):
        assert torch.equal(inputs.image_mask[:, index], torch.from_numpy(arrays[f"model.image_mask.{camera}"]))
        rows = torch.from_numpy(arrays[f"model.image_first_sample_rows0_8.{camera}"])
        assert torch.equal(inputs.images[0, index, :, :8], rows)
        if f"model_uint8.{camera}" in arrays:
            pixels = torch.from_numpy(arrays[f"model_uint8.{camera}"]).permute(0, 3, 1, 2)
            assert torch.equal(inputs.images[:, index], pixels.float() / 255.0 * 2.0 - 1.0)
    np.testing.assert_array_equal(inputs.tokens.numpy(), arrays["model.tokens"])
    np.testing.assert_array_equal(inputs.token_mask.numpy(), arrays["model.token_mask"])
    state = processing.state(observation.state)
    np.testing.assert_allclose(state, arrays["model.state"][:, : state.shape[1]], rtol=1e-9, atol=1e-9)
    close(inputs.state, torch.from_numpy(arrays["model.state"]), 1e-6)
    actions = processing.env_actions(arrays["out.model_actions"][:, : described["action_chunk"]], observation)
    assert actions.dtype == np.float64
    np.testing.assert_allclose(actions, arrays["out.env_actions"], rtol=1e-6, atol=1e-6)
    targets = processing.targets(arrays["train.raw_actions"], observation.state)
    np.testing.assert_allclose(targets, arrays["train.model_actions"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("folder", PI0_IO)
def test_resizing(folder: Path) -> None:
    arrays = np.load(folder / "io.npz")
    for name in (name for name in arrays if name.startswith("resize.in_")):
        image, size = arrays[name], name.removeprefix("resize.in_")
        kinds = [key for key in arrays if key.startswith("resize.pil") and f"_{size}_to_" in key]
        for key in kinds:
            np.testing.assert_array_equal(resize_pil(image[None], arrays[key].shape[0])[0], arrays[key])
            floats = arrays[key.replace("pil_uint8", "torch_float")]
            resized = resize_torch(torch.from_numpy(image)[None].permute(0, 3, 1, 2) / 255.0 * 2 - 1, len(floats), -1.0)
            close(resized[0].permute(1, 2, 0), torch.from_numpy(floats), 1e-5)


@pytest.mark.parametrize("folder", PI0_IO)
def test_quantiles(folder: Path) -> None:
    arrays = np.load(folder / "io.npz")
    state, actions = read_norm_stats(folder / "assets" / NORM_STATS, quantiles=True)
    np.testing.assert_allclose(state.forward(arrays["quantile.in8"]), arrays["quantile.norm_state"], rtol=1e-9)
    for norm, name in ((state, "state"), (actions, "actions")):
        np.testing.assert_allclose(
            norm.inverse(arrays["quantile.in32"]), arrays[f"quantile.unnorm_{name}"], rtol=1e-6, atol=1e-9
        )


@pytest.mark.parametrize("folder", PI05_IO)
def test_openpi_libero_pi05(folder: Path) -> None:
    arrays, described = np.load(folder / "io.npz"), read_json(folder / "io.json")
    processing, prompts = processing_of(folder, pi05=True), tuple(described["prompts"])
    observation = Observation(arrays["env.main_images"], arrays["env.wrist_images"], arrays["env.state"], prompts)
    state = processing.state(observation.state)
    np.testing.assert_allclose(state, arrays["model.state"][:, : state.shape[1]], rtol=1e-9, atol=1e-9)
    for kind in (name.removesuffix(".tokens") for name in arrays if name.endswith(".tokens")):
        style = "text_and_state" if kind.startswith("discrete_state") else "text"
        variant = replace(processing, prompt_style=style, token_len=arrays[f"{kind}.tokens"].shape[1])
        tokens, valid = variant.tokens(prompts, state)
        np.testing.assert_array_equal(tokens, arrays[f"{kind}.tokens"])
        np.testing.assert_array_equal(valid, arrays[f"{kind}.token_mask"])
        texts = [prompt_text(style, prompt, row) for prompt, row in zip(prompts, state, strict=True)]
        assert texts == [handed_over[0] for handed_over in described[f"{kind}.texts"]]
    np.testing.assert_array_equal(state_bins(arrays["digitize.in"]), arrays["digitize.out"])
    actions = processing.env_actions(arrays["out.model_actions"][:, : described["action_chunk"]], observation)
    np.testing.assert_allclose(actions, arrays["out.env_actions"], rtol=1e-6, atol=1e-6)
    targets = processing.targets(arrays["train.raw_actions"], observation.state)
    np.testing.assert_allclose(targets, arrays["train.model_actions"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("folder", folders("policy_preprocessor.json", "io.safetensors"))
def test_lerobot_processors(folder: Path) -> None:
    state_norm, action_norm = read_normalisations(folder)
    arrays = load_file(folder / "io.safetensors")
    if "stats.action.q01" in arrays:  # statistics of their own: one dimension without spread
        state_norm, action_norm = (
            Normalisation(
                norm.method,
                tuple(arrays[f"stats.{name}.q01"].tolist()),
                tuple(arrays[f"stats.{name}.q99"].tolist()),
                norm.convention,
            )
            for norm, name in ((state_norm, "observation.state"), (action_norm, "action"))
        )
    state = state_norm.forward(arrays["in.state"].numpy().reshape(arrays["out.state"].shape))
    close(torch.from_numpy(state), arrays["out.state"], 1e-6)
    close(torch.from_numpy(action_norm.inverse(arrays["in.action"].numpy())), arrays["out.action"], 1e-6)
    if (folder / "io.json").is_file():
        described = read_json(folder / "io.json")
        texts = [prompt_text("text_and_state", t, row) for t, row in zip(described["tasks"], state, strict=True)]
        assert texts == described["texts"]


@pytest.mark.parametrize("folder", folders("keys.json", "config.json", "outputs.safetensors"))
def test_lerobot_network(folder: Path) -> None:
    """LeRobot's file holds openpi's network; with its own sampling grid and images of its own."""
    base = folder.with_name(folder.name.replace("lerobot", "openpi"))
    config, expected = architecture(base), load_file(folder / "outputs.safetensors")
    stored = folder / "model.safetensors"
    tensors = load_file(stored) if stored.is_file() else prefixed(load_file(base / "model.safetensors"))
    keys = read_json(folder / "keys.json")
    assert set(tensors) <= set(keys)
    model = Pi0(config)
    model.load_state_dict(lerobot_weights(tensors, config.pi05))
    arrays = load_file(base / "inputs.safetensors")
    inputs = model_inputs(arrays)
    close(model.embed_prefix(inputs)[0], expected["model.prefix_embs"], 1e-4)
    loss = model.flow_matching_loss(inputs, arrays["actions"], arrays["noise"], arrays["time"])
    close(loss, expected["model.loss_per_element"], 1e-3)

    images = [expected[name] for name in sorted(expected) if name.startswith("in.observation.images")]
    size = config.vision.image_size
    resized = [resize_torch(image, size, 0.0) * 2 - 1 for image in images]
    for index, image in enumerate(resized):
        close(image, expected[f"out.image_{index}"], 1e-5)
        assert expected[f"out.mask_{index}"].all()
    seen = replace(
        inputs,
        images=torch.stack(resized, dim=1),
        image_mask=torch.ones(len(inputs), len(resized), dtype=torch.bool),
        tokens=expected["in.observation.language.tokens"],
        token_mask=expected["in.observation.language.attention_mask"],
        state=torch.nn.functional.pad(
            expected["in.observation.state"], (0, config.state_dim - expected["in.observation.state"].shape[1])
        ),
    )
    for name, actions, look, noise in (
        ("model.sample_actions/num_steps=10", 32, inputs, arrays["noise"]),
        ("out.action_chunk", 7, seen, expected["in.noise"]),
    ):
        prefix, _ = model.prefix(look)
        x = noise
        for k in range(10):
            x = x - model.velocity(prefix, x, torch.full((len(x),), 1 - k / 10))[0] / 10
        close(x[..., :actions], expected[name], 2e-4)


def prefixed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"model.{name}": tensor for name, tensor in tensors.items()}
