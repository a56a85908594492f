"""Anything doubtful about a checkpoint is refused in one line that names what, where, expected, got, and what to do."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_policy_checkpoints import write_lerobot, write_openpi
from tiny_policies import make_policy
from torch import Tensor

from pi0rl.errors import UserError, first_line
from pi0rl.policy.checkpoints import load_policy, save_policy
from pi0rl.policy.foreign import NORM_STATS, load_openpi
from pi0rl.policy.lerobot import load_lerobot


class Evil:
    """A pickle that would run code."""

    def __reduce__(self):
        return (print, ("ran",))


def weights(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return spoil


def bytes_of(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        (directory / name).write_bytes(change((directory / name).read_bytes()))

    return spoil


def written(name: str, content: bytes) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        (directory / name).write_bytes(content)

    return spoil


def edited(name: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        content = json.loads((directory / name).read_text())
        change(content)
        (directory / name).write_text(json.dumps(content))

    return spoil


def without_weights(*files: str) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        (directory / "model.safetensors").unlink()
        for file in files:
            (directory / file).parent.mkdir(exist_ok=True)
            (directory / file).write_text("{}")

    return spoil


IN_BIAS = "action_in_proj.bias"
OPENPI = {
    "truncated": (bytes_of("model.safetensors", lambda b: b[:-100]), r"model.safetensors: not a readable .*truncated"),
    "git-lfs pointer": (written("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "pickle as safetensors": (written("model.safetensors", pickle.dumps({"a": 1})), "a pickle, expected safetensors"),
    "no weights": (without_weights(), "no .*safetensors file; expected model.safetensors or its shards"),
    "adapter": (without_weights("adapter_config.json"), "a LoRA adapter, expected whole weights; merge"),
    "JAX": (without_weights("params/_METADATA"), "JAX checkpoint.*convert_jax_model_to_pytorch"),
    "missing key": (
        weights(lambda t: t.pop("state_proj.bias")),
        r"state_proj.bias is missing, expected shape",
    ),
    "renamed key": (
        weights(lambda t: t.update({"action_in_projection.bias": t.pop(IN_BIAS)})),
        r"action_in_proj.bias is missing, expected shape \[128\], got action_in_projection.bias",
    ),
    "shape": (weights(lambda t: t.update({IN_BIAS: torch.zeros(3)})), r"bias has shape \[3\], expected \[128\]"),
    "dtype": (weights(lambda t: t.update({IN_BIAS: t[IN_BIAS].to(torch.int8)})), r"has dtype int8, expected float32"),
    "unknown key": (weights(lambda t: t.update(surprise=torch.zeros(3))), r"surprise \[3\], expected none"),
    "another variant": (
        weights(lambda t: t.update({"time_mlp_in.weight": torch.zeros(128, 128)})),
        "weights of pi0.5, expected pi0",
    ),
    "LoRA keys": (weights(lambda t: t.update({"x.lora_A.weight": torch.zeros(3)})), "merge them into their base model"),
    "no statistics": (lambda d: (d / NORM_STATS).unlink(), r"no .*norm_stats.json, without which this policy cannot"),
    "missing statistics": (
        edited(NORM_STATS, lambda s: s["norm_stats"]["actions"].pop("mean")),
        r"norm_stats.actions.mean is missing, expected a list of at least 7 numbers, got \['std'\]",
    ),
    "short statistics": (
        edited(NORM_STATS, lambda s: s["norm_stats"]["state"].update(mean=[0.0, 1.0])),
        r"norm_stats.state.mean has 2 entries, expected at least 8",
    ),
    "statistics of words": (
        edited(NORM_STATS, lambda s: s["norm_stats"]["state"].update(mean=["a"] * 8)),
        "not all finite numbers",
    ),
    "statistics of another form": (
        edited(NORM_STATS, lambda s: s.update(norm_stats=[1.0])),
        "norm_stats is list, expected state and actions",
    ),
    "list of statistics": (
        edited(NORM_STATS, lambda s: s["norm_stats"].update(state=[1.0])),
        r"norm_stats.state.mean is missing, expected a list of at least 8 numbers, got nothing",
    ),
    "truncated statistics": (bytes_of(NORM_STATS, lambda b: b[:-5]), r"norm_stats.json: not readable as JSON"),
    "truncated tokenizer": (bytes_of("tokenizer.json", lambda b: b[:-9]), "tokenizer.json is not a tokenizer"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer; put PaliGemma's"),
    "code in a pickle": (written("full_weights.pt", pickle.dumps({"weight": Evil()})), "nothing was run"),
    "foreign pickle": (
        lambda d: torch.save({"step": 3}, d / "full_weights.pt"),
        "expected tensors only, got step: int",
    ),
    "truncated pickle": (written("full_weights.pt", b"PK\x03\x04"), r"full_weights.pt: not a plain file of tensors"),
}


@pytest.fixture(scope="module")
def openpi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("openpi") / "policy"
    folder.mkdir()
    write_openpi(make_policy(), folder)
    return folder


@pytest.fixture(scope="module")
def lerobot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lerobot") / "policy"
    folder.mkdir()
    write_lerobot(make_policy(), folder)
    return folder


def refused(load: Callable[[Path], object], folder: Path, says: str) -> None:
    with pytest.raises(UserError, match=says) as refusal:
        load(folder)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", OPENPI)
def test_openpi_checkpoints(openpi: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, says = OPENPI[name]
    shutil.copytree(openpi, tmp_path / "policy")
    spoil(tmp_path / "policy")
    refused(lambda folder: load_openpi(folder, config=make_policy().config), tmp_path / "policy", says)
    assert capsys.readouterr().out == ""


def enable_relative_actions(pipeline: dict[str, Any]) -> None:
    config = {"enabled": True, "exclude_joints": ["wrist"], "action_names": list("abcdefg")}
    pipeline["steps"].append({"registry_name": "relative_actions_processor", "config": config})


def cameras(*names: str) -> dict[str, Any]:
    return {f"observation.images.{name}": {"type": "VISUAL", "shape": [3, 256, 256]} for name in names}


LEROBOT = {
    "another policy": (edited("config.json", lambda c: c.update(type="act")), "type is act, expected pi0 or pi05"),
    "another variant": (
        edited("config.json", lambda c: c.update(type="pi05")),
        "type is pi05, but the weights are of pi0",
    ),
    "incomplete config": (edited("config.json", lambda c: c.pop("chunk_size")), "key chunk_size is missing"),
    "memory": (
        edited("config.json", lambda c: c.update(use_visual_memory=True)),
        "use_visual_memory is True, expected",
    ),
    "words for numbers": (
        edited("config.json", lambda c: c.update(chunk_size="many")),
        "chunk_size is 'many', expected a positive whole number",
    ),
    "unknown step": (
        edited("policy_preprocessor.json", lambda p: p["steps"].append({"registry_name": "blur_images"})),
        "step blur_images is not known, expected those of LeRobot's pi0 and pi05",
    ),
    "no steps": (
        edited("policy_postprocessor.json", lambda p: p.pop("steps")),
        "key steps is NoneType, expected a list",
    ),
    "no method": (
        edited("policy_preprocessor.json", lambda p: p["steps"][0]["config"].clear()),
        "norm_map.STATE is None, expected one of MEAN_STD, QUANTILES",
    ),
    "no normaliser": (
        edited("policy_preprocessor.json", lambda p: p["steps"].clear()),
        "no step normalizer_processor, which says how values are normalised; download the whole",
    ),
    "no state_file": (
        edited("policy_preprocessor.json", lambda p: p["steps"][0].pop("state_file")),
        "step normalizer_processor has no state_file; this policy cannot act without its statistics",
    ),
    "other method": (
        edited("policy_preprocessor.json", lambda p: p["steps"][0]["config"]["norm_map"].update(STATE="MIN_MAX")),
        "norm_map.STATE is MIN_MAX, expected one of MEAN_STD, QUANTILES",
    ),
    "no statistics": (lambda d: (d / "policy_preprocessor_0.safetensors").unlink(), "not found, but .* names it"),
    "truncated statistics": (bytes_of("policy_preprocessor_0.safetensors", lambda b: b[:-9]), "not a readable"),
    "relative to other joints": (
        edited("policy_preprocessor.json", enable_relative_actions),
        "relative_actions_processor is enabled with action_names",
    ),
    "other cameras": (
        edited("config.json", lambda c: c.update(input_features=cameras("wrist", "front"))),
        r"cameras \['observation.images.wrist', 'observation.images.front'\], expected the room's view",
    ),
    "normalised images": (
        edited("policy_preprocessor.json", lambda p: p["steps"][0]["config"]["norm_map"].update(VISUAL="MEAN_STD")),
        "norm_map.VISUAL is MEAN_STD, expected IDENTITY",
    ),
    "old names": (
        weights(lambda t: t.update({"model.paligemma_with_expert.paligemma.vision_tower.x": torch.zeros(1)})),
        "named as before September 2025",
    ),
}


@pytest.mark.parametrize("name", LEROBOT)
def test_lerobot_checkpoints(lerobot: Path, tmp_path: Path, name: str) -> None:
    spoil, says = LEROBOT[name]
    shutil.copytree(lerobot, tmp_path / "policy")
    spoil(tmp_path / "policy")

    def load(folder: Path) -> object:
        return load_policy(folder) if name == "another policy" else load_lerobot(folder, config=make_policy().config)

    refused(load, tmp_path / "policy", says)


def test_the_wrong_variant(openpi: Path) -> None:
    refused(
        lambda folder: load_openpi(folder, config=replace(make_policy().config, pi05=True)),
        openpi,
        r"state.q01 is missing",
    )


def test_sizes_that_cannot_be_told(openpi: Path, tmp_path: Path) -> None:
    """Without a given architecture it is read off the weights."""
    patches = "paligemma_with_expert.paligemma.model.vision_tower.vision_model.embeddings.patch_embedding.weight"
    for number, (spoil, says) in enumerate(
        (
            (weights(lambda t: t.update({patches: torch.zeros(3, 4)})), r"has shape \[3, 4\], expected 4 dimensions"),
            (weights(lambda t: t.pop(patches)), "patch_embedding.weight is missing, expected it in every pi0"),
            (weights(lambda t: None), "vision width is 128, expected SigLIP So400m's 1152"),
            (
                edited("config.json", lambda c: c.update(action_horizon="50")),
                "action_horizon is '50', expected a positive",
            ),
        )
    ):
        shutil.copytree(openpi, tmp_path / str(number))
        spoil(tmp_path / str(number))
        refused(load_policy, tmp_path / str(number), says)


def test_own_checkpoints_are_verified(tmp_path: Path) -> None:
    save_policy(make_policy(), tmp_path / "good")
    for name in ("model.safetensors", "config.json"):
        bad = tmp_path / name
        shutil.copytree(tmp_path / "good", bad)
        bytes_of(name, lambda content: content[:-9])(bad)
        refused(load_policy, bad, name)
    edited("config.json", lambda c: c["model"]["vision"].update(width="wide"))(tmp_path / "good")
    refused(load_policy, tmp_path / "good", "vision")
    refused(load_policy, tmp_path / "nowhere", "no such checkpoint directory; expected a directory, a hub id")


def test_other_libraries_errors_are_quoted_in_one_line() -> None:
    assert first_line(ValueError("\nwhy\nwhere")) == "why"
    assert first_line(EOFError()) == "EOFError"
