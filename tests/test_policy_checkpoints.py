"""Checkpoints: what is written comes back, foreign layouts are read, anything doubtful is refused in one line."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_policy import SDE, make_policy, noise_for, observe

from pi0rl.errors import UserError
from pi0rl.policy.checkpoints import load_policy, save_policy
from pi0rl.policy.critic import CriticConfig, NoiseHeadConfig
from pi0rl.policy.foreign import EMBEDDING, NORM_STATS, TIED_EMBEDDING, UNUSED_HEAD, load_openpi
from pi0rl.policy.lerobot import load_lerobot
from pi0rl.policy.policy import Policy
from pi0rl.policy.sampling import sample
from pi0rl.policy.weights import policy_tensors

VLM_NORM = "paligemma_with_expert.paligemma.model.language_model.norm.weight"


def act(policy: Policy) -> torch.Tensor:
    return sample(policy, policy.processing.inputs(observe(8)), noise_for(range(8)), SDE, "train").chains


@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
def test_own_checkpoint_round_trip(tmp_path: Path, pi05: bool) -> None:
    policy = make_policy(CriticConfig("expert", (16,)), NoiseHeadConfig((0.1, 0.3), (8,)), pi05)
    policy.get_parameter("model." + VLM_NORM).data = policy.get_parameter("model." + VLM_NORM).data.bfloat16()
    save_policy(policy, tmp_path / "policy")
    first = (tmp_path / "policy/model.safetensors").read_bytes()
    loaded = load_policy(tmp_path / "policy")
    for part in ("config", "processing", "critic_config", "noise_config"):
        assert getattr(loaded, part) == getattr(policy, part)
    assert [t.dtype for t in loaded.state_dict().values()] == [t.dtype for t in policy.state_dict().values()]
    assert torch.equal(act(loaded), act(policy))
    save_policy(loaded, tmp_path / "policy")  # onto the file the weights are mapped from
    assert (tmp_path / "policy/model.safetensors").read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def write_openpi(policy: Policy, directory: Path) -> None:
    """As openpi's save_model leaves it: the tied embedding under its other name, an unused head, statistics beside."""
    tensors = policy_tensors(policy)
    tensors[TIED_EMBEDDING] = tensors.pop(EMBEDDING)
    tensors[UNUSED_HEAD] = torch.zeros(policy.config.vocab_size, policy.config.expert.width)
    (directory / NORM_STATS).parent.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"action_horizon": policy.config.action_horizon}))
    names = ("q01", "q99") if policy.config.pi05 else ("mean", "std")
    norms = {"state": policy.processing.state_norm, "actions": policy.processing.action_norm}
    stats = {key: {names[0]: norm.first, names[1]: norm.second} for key, norm in norms.items()}
    (directory / NORM_STATS).write_text(json.dumps({"norm_stats": stats}))
    write_word_level_tokenizer(directory / "tokenizer.json")


def write_word_level_tokenizer(file: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({"<unk>": 1, "<bos>": 2, "pick": 3, "up": 4, "the": 5}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.save(str(file))


@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
def test_openpi_layout(tmp_path: Path, pi05: bool) -> None:
    policy = make_policy(pi05=pi05)
    write_openpi(policy, tmp_path)
    loaded = load_openpi(tmp_path, config=policy.config)
    assert loaded.processing.delta_actions is not pi05
    assert loaded.processing.tokens(("pick up",), np.zeros((1, 8)))[0][0, :3].tolist() == [2, 3, 4]
    loaded.processing = policy.processing
    assert torch.equal(act(loaded), act(policy))


def test_rlinf_layout(tmp_path: Path) -> None:
    """The runner's file holds heads and both names of the embedding, but no statistics: those come from the start."""
    policy = make_policy(CriticConfig("expert", (16, 8)), NoiseHeadConfig((0.1, 0.3), (8,)))
    write_openpi(policy, tmp_path / "sft")
    tensors = policy_tensors(policy)
    tensors[TIED_EMBEDDING] = tensors[EMBEDDING]
    file = tmp_path / "global_step_40/actor/model_state_dict/full_weights.pt"
    file.parent.mkdir(parents=True)
    torch.save(tensors, file)
    with pytest.raises(UserError, match="norm_stats"):
        load_openpi(tmp_path / "global_step_40", config=policy.config)
    loaded = load_openpi(tmp_path / "global_step_40", assets=tmp_path / "sft", config=policy.config)
    assert loaded.critic_config == policy.critic_config
    assert loaded.noise_config is not None
    assert loaded.noise_config.hidden == (8,)
    assert loaded.noise_config.std_range == pytest.approx((0.1, 0.3))
    loaded.processing = policy.processing
    assert torch.equal(act(loaded), act(policy))


@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
def test_lerobot_layout(tmp_path: Path, pi05: bool) -> None:
    policy = make_policy(pi05=pi05)
    write_lerobot(policy, tmp_path)
    loaded = load_lerobot(tmp_path, config=policy.config)
    assert loaded.processing.prompt_style == ("text_and_state" if pi05 else "lerobot_text")
    assert loaded.processing.state_norm.first == pytest.approx(policy.processing.state_norm.first)
    assert not loaded.processing.delta_actions
    loaded.processing = policy.processing
    assert torch.equal(act(loaded), act(policy))


def write_lerobot(policy: Policy, directory: Path) -> None:
    """As LeRobot saves it: both embeddings, of which only embed_tokens is the network's, and processor files."""
    config, processing = policy.config, policy.processing
    tensors = {f"model.{name}": tensor for name, tensor in policy_tensors(policy).items()}
    tensors[f"model.{TIED_EMBEDDING}"] = torch.zeros_like(tensors[f"model.{EMBEDDING}"])
    save_file(tensors, directory / "model.safetensors")
    described = {"type": "pi05" if config.pi05 else "pi0", "chunk_size": config.action_horizon}
    (directory / "config.json").write_text(json.dumps(described | {"tokenizer_max_length": config.max_token_len}))
    stats = {}
    for feature, norm in (("observation.state", processing.state_norm), ("action", processing.action_norm)):
        stats |= {f"{feature}.mean": torch.tensor(norm.first), f"{feature}.std": torch.tensor(norm.second)}
    for file, step in (("policy_preprocessor", "normalizer"), ("policy_postprocessor", "unnormalizer")):
        save_file(stats, directory / f"{file}_0.safetensors")
        norm_map = {"STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
        entry = {"registry_name": f"{step}_processor", "config": {"norm_map": norm_map}}
        steps = [entry | {"state_file": f"{file}_0.safetensors"}]
        (directory / f"{file}.json").write_text(json.dumps({"steps": steps}))
    write_word_level_tokenizer(directory / "tokenizer.json")


class Evil:
    """A pickle that would run code."""

    def __reduce__(self):
        return (print, ("ran",))


def refuse_truncated(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def refuse_missing_weight(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["action_in_proj.weight"]
    save_file(tensors, directory / "model.safetensors")


def refuse_shape(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["action_in_proj.bias"] = torch.zeros(3)
    save_file(tensors, directory / "model.safetensors")


def refuse_unknown_weight(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {"surprise": torch.zeros(3)}, directory / "model.safetensors")


def refuse_missing_statistics(directory: Path) -> None:
    (directory / NORM_STATS).write_text(json.dumps({"norm_stats": {"state": {"mean": [0.0], "std": [1.0]}}}))


def refuse_missing_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()


def refuse_code(directory: Path) -> None:
    (directory / "full_weights.pt").write_bytes(pickle.dumps({"weight": Evil()}))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (refuse_truncated, "model.safetensors: not a readable"),
        (refuse_missing_weight, "action_in_proj.weight"),
        (refuse_shape, r"action_in_proj.bias has shape \[3\], expected \[128\]"),
        (refuse_unknown_weight, "surprise"),
        (refuse_missing_statistics, r"norm_stats.actions.mean is missing"),
        (refuse_missing_tokenizer, "no tokenizer"),
        (refuse_code, "full_weights.pt: not a plain file of tensors"),
    ],
)
def test_foreign_checkpoints_are_refused(tmp_path: Path, spoil, says: str, capsys) -> None:
    policy = make_policy()
    write_openpi(policy, tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=says) as refusal:
        load_openpi(tmp_path, config=policy.config)
    assert "\n" not in str(refusal.value)
    assert capsys.readouterr().out == ""


def test_the_wrong_variant_is_refused(tmp_path: Path) -> None:
    write_openpi(make_policy(), tmp_path)
    with pytest.raises(UserError, match=r"norm_stats.state.q01|is this the right variant"):
        load_openpi(tmp_path, config=replace(make_policy().config, pi05=True))


def test_own_checkpoints_are_verified(tmp_path: Path) -> None:
    save_policy(make_policy(), tmp_path / "good")
    for name, spoil in {"weights": "model.safetensors", "config": "config.json"}.items():
        bad = tmp_path / name
        shutil.copytree(tmp_path / "good", bad)
        (bad / spoil).write_bytes((bad / spoil).read_bytes()[:-9])
        with pytest.raises(UserError, match=spoil):
            load_policy(bad)
    described = json.loads((tmp_path / "good/config.json").read_text())
    described["model"]["vision"]["width"] = "wide"
    (tmp_path / "good/config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="vision"):
        load_policy(tmp_path / "good")
    with pytest.raises(UserError, match="no such checkpoint"):
        load_policy(tmp_path / "nowhere")
