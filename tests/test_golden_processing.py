"""Images, states, prompts and actions against openpi, RLinf and LeRobot; LeRobot's checkpoints against the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from goldens import CAMERAS, architecture, close, fixtures, model_inputs, network_of, read_json
from safetensors.torch import load_file

from pi0rl.libero.simulation import axis_angle
from pi0rl.observation import Observation
from pi0rl.policy.action_tokens import bins
from pi0rl.policy.config import PI0, PI05, Pi0Config
from pi0rl.policy.foreign import openpi_processing, read_norm_stats
from pi0rl.policy.lerobot import lerobot_processors, lerobot_weights, read_normalisations
from pi0rl.policy.model import Pi0
from pi0rl.policy.processing import Normalisation, Processing, resize_pil, resize_torch
from pi0rl.policy.tokenizer import SentencePieceTokenizer, WordTokenizer, prompt_text

pytestmark = pytest.mark.golden

PI0_IO = fixtures("libero_io")


def norm_stats_of(folder: Path) -> Path:
    (file,) = folder.glob("assets/**/norm_stats.json")
    return file


def processing_of(folder: Path, config: Pi0Config) -> Processing:
    norms = read_norm_stats(norm_stats_of(folder), quantiles=config.pi05)
    (tokenizer,) = folder.glob("*.model")
    return openpi_processing(config, SentencePieceTokenizer(tokenizer.read_bytes()), norms)


def sized(config: Pi0Config, arrays: Mapping[str, np.ndarray], token_len: int) -> Pi0Config:
    """``config`` with the fixture's image size, action width and language positions."""
    pixels = [arrays[name].shape[-1] for name in arrays if name.startswith("model.image_first_sample_rows")]
    vision = replace(config.vision, image_size=pixels[0]) if pixels else config.vision
    width = arrays["model.state"].shape[1]
    return replace(config, vision=vision, max_token_len=token_len, action_dim=width, state_dim=width)


@pytest.mark.parametrize("folder", PI0_IO)
def test_openpi_libero(folder: Path) -> None:
    arrays, described = np.load(folder / "io.npz"), read_json(folder / "io.json")
    processing = replace(processing_of(folder, sized(PI0, arrays, described["max_len"])), absent_camera=True)
    observation = Observation(
        arrays["raw.agentview_image"],
        arrays["raw.robot0_eye_in_hand_image"],
        arrays["env.state"],
        tuple(described["prompts"]),
    )
    inputs = processing.inputs(observation)
    for index, camera in enumerate(CAMERAS):
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
def test_axis_angle(folder: Path) -> None:
    arrays = np.load(folder / "io.npz")
    angles = np.stack([axis_angle(quaternion) for quaternion in arrays["quat.in"]])
    np.testing.assert_allclose(angles, arrays["quat.axisangle"], rtol=1e-9, atol=1e-9)
    parts = ("raw.robot0_eef_pos", "raw.robot0_eef_quat", "raw.robot0_gripper_qpos")
    rows = zip(*(arrays[name] for name in parts), strict=True)
    state = np.stack([np.concatenate((position, axis_angle(q), fingers)) for position, q, fingers in rows])
    np.testing.assert_allclose(state, arrays["env.state"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("folder", PI0_IO)
def test_quantiles(folder: Path) -> None:
    arrays = np.load(folder / "io.npz")
    state, actions = read_norm_stats(norm_stats_of(folder), quantiles=True)
    np.testing.assert_allclose(state.forward(arrays["quantile.in8"]), arrays["quantile.norm_state"], rtol=1e-9)
    for norm, name in ((state, "state"), (actions, "actions")):
        np.testing.assert_allclose(
            norm.inverse(arrays["quantile.in32"]), arrays[f"quantile.unnorm_{name}"], rtol=1e-6, atol=1e-9
        )


@pytest.mark.parametrize("folder", fixtures("libero_io_pi05"))
def test_openpi_libero_pi05(folder: Path) -> None:
    arrays, described = np.load(folder / "io.npz"), read_json(folder / "io.json")
    length = described["pi05_libero.max_token_len"]
    processing, prompts = processing_of(folder, sized(PI05, arrays, length)), tuple(described["prompts"])
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
    np.testing.assert_array_equal(bins(arrays["digitize.in"]), arrays["digitize.out"])
    actions = processing.env_actions(arrays["out.model_actions"][:, : described["action_chunk"]], observation)
    np.testing.assert_allclose(actions, arrays["out.env_actions"], rtol=1e-6, atol=1e-6)
    targets = processing.targets(arrays["train.raw_actions"], observation.state)
    np.testing.assert_allclose(targets, arrays["train.model_actions"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("folder", fixtures("lerobot_processor"))
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


@pytest.mark.parametrize("folder", fixtures("lerobot_network"))
def test_lerobot_network(folder: Path) -> None:
    """LeRobot's file holds openpi's network; with its own sampling grid and images of its own."""
    described, expected = read_json(folder / "config.json"), load_file(folder / "outputs.safetensors")
    base = network_of(folder, pi05=described["type"] == "pi05")
    config = architecture(base)
    stored = folder / "model.safetensors"
    tensors = load_file(stored) if stored.is_file() else prefixed(load_file(base / "model.safetensors"))
    assert set(tensors) <= set(read_json(folder / "keys.json"))
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
    runs = [("out.action_chunk", seen, expected["in.noise"], described["num_inference_steps"])]
    samples = [name for name in expected if name.startswith("model.sample_actions/")]
    runs += [(name, inputs, arrays["noise"], int(name.split("=")[1])) for name in samples]
    for name, look, noise, steps in runs:
        prefix, _ = model.prefix(look)
        x = noise
        for k in range(steps):
            x = x - model.velocity(prefix, x, torch.full((len(x),), 1 - k / steps))[0] / steps
        close(x[..., : expected[name].shape[-1]], expected[name], 2e-4)


def prefixed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"model.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("folder", fixtures("lerobot_processor"))
def test_written_pipelines_are_lerobot_s(folder: Path) -> None:
    """Steps, their order and settings; only the tokenizer's place depends on the tokenizer."""
    described = read_json(folder / "config.json")
    config = replace(PI05 if described["type"] == "pi05" else PI0, max_token_len=described["tokenizer_max_length"])
    norms = read_normalisations(folder)
    processing = replace(openpi_processing(config, WordTokenizer(), norms), delta_actions=False)
    files = lerobot_processors(config, processing)
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        ours, theirs = files[name]["steps"], read_json(folder / name)["steps"]
        assert [step["registry_name"] for step in ours] == [step["registry_name"] for step in theirs]
        for our, their in zip(ours, theirs, strict=True):
            assert our.get("state_file") == their.get("state_file")
            if our["registry_name"] != "tokenizer_processor":
                assert our["config"] == their["config"], our["registry_name"]
        stored = {step["state_file"]: step for step in ours if "state_file" in step}
        for file in stored:
            reference = load_file(folder / file)
            for key, values in files[file].items():
                torch.testing.assert_close(values, reference[key], rtol=1e-6, atol=0)
