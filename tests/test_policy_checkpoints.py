"""Checkpoints: what is written comes back, and foreign layouts are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_policies import SDE, make_policy, noise_for, observe

from pi0rl.cli import main
from pi0rl.errors import UserError
from pi0rl.policy.checkpoints import load_policy, save_policy
from pi0rl.policy.conversion import BF16_ROUNDING, Target, compare, convert
from pi0rl.policy.critic import CriticConfig, NoiseHeadConfig
from pi0rl.policy.export import save_lerobot, save_openpi
from pi0rl.policy.foreign import EMBEDDING, NORM_STATS, TIED_EMBEDDING, UNUSED_HEAD, load_openpi, openpi_processing
from pi0rl.policy.lerobot import load_lerobot
from pi0rl.policy.policy import Policy, with_heads
from pi0rl.policy.precision import set_precision
from pi0rl.policy.processing import Normalisation, Processing
from pi0rl.policy.sampling import sample
from pi0rl.policy.sources import ORIGIN
from pi0rl.policy.tokenizer import HuggingFaceTokenizer
from pi0rl.policy.weights import policy_tensors, sha256

VLM_NORM = "paligemma_with_expert.paligemma.model.language_model.norm.weight"


def act(policy: Policy) -> torch.Tensor:
    return sample(policy, policy.processing.inputs(observe(8)), noise_for(range(8)), SDE, "train").chains


def assert_same(loaded: Policy, policy: Policy) -> None:
    """The very weights; what they compute may differ by rounding, which depends on where a file was mapped."""
    own, other = policy_tensors(policy), policy_tensors(loaded)
    assert own.keys() == other.keys()
    assert all(tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in own.items())
    torch.testing.assert_close(act(loaded), act(policy), rtol=1e-4, atol=1e-4)


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
    assert_same(loaded, policy)
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
    assert_same(loaded, policy)


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
    assert_same(loaded, policy)


def test_heads_that_rlinf_trained_are_gone_on_with(tmp_path: Path) -> None:
    """The file tells the noise head's bounds by float32 logarithms; how a critic is trained is not in it at all."""
    start = make_policy(CriticConfig("expert", (16,)), NoiseHeadConfig((0.08, 0.16), (8,)))
    write_openpi(start, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(policy_tensors(start), tmp_path / "full_weights.pt")
    loaded = load_openpi(tmp_path, config=start.config)
    assert loaded.noise_config == start.noise_config
    wanted = CriticConfig("expert", (16,), detach=False, matches_rollout=True)
    kept = with_heads(loaded, wanted, start.noise_config, seed=1)
    assert kept.critic_config == wanted
    assert kept.value_head is loaded.value_head
    assert kept.noise_head is loaded.noise_head
    other = with_heads(loaded, replace(wanted, chunk_only=True), NoiseHeadConfig((0.1, 0.16), (8,)), seed=1)
    assert other.value_head is not loaded.value_head
    assert other.noise_head is not loaded.noise_head


@pytest.mark.parametrize("save", [save_openpi, save_lerobot])
def test_float16_is_widened(tmp_path: Path, save: Callable[[Policy, Path], None]) -> None:
    """Masked attention leaves its range."""
    policy = with_word_level_tokenizer(make_policy(), tmp_path)
    save(policy, tmp_path / "policy")
    file = tmp_path / "policy/model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
    loaded = load_policy(tmp_path / "policy")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert (act(loaded) - act(policy)).abs().max() < 0.05


def test_openpi_s_pi05_says_whether_it_sees_the_state(tmp_path: Path) -> None:
    policy = make_policy(pi05=True)
    write_openpi(policy, tmp_path)
    assert load_openpi(tmp_path, config=policy.config).processing.prompt_style == "text"
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"discrete_state_input": True}))
    assert load_openpi(tmp_path, config=policy.config).processing.prompt_style == "text_and_state"


def test_every_lerobot_finds_the_tokenizer(tmp_path: Path) -> None:
    """Releases up to 0.6.1 take the name of a folder for one on the hub; later ones go by ``artifacts``."""
    save_lerobot(with_word_level_tokenizer(make_policy(), tmp_path), tmp_path / "policy")
    steps = json.loads((tmp_path / "policy/policy_preprocessor.json").read_text())["steps"]
    (step,) = (step for step in steps if step["registry_name"] == "tokenizer_processor")
    assert step["config"]["tokenizer_name"] == "google/paligemma-3b-pt-224"
    assert (tmp_path / "policy" / step["artifacts"]["tokenizer_name"] / "tokenizer.json").is_file()


def test_lerobot_checkpoints_as_they_used_to_be(tmp_path: Path) -> None:
    """Without tokenizer, with pi0's time projections under another name; and a tokenizer with a token for images."""
    policy = make_policy()
    write_lerobot(policy, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {name.replace("action_time_mlp", "time_mlp"): t for name, t in tensors.items()}, tmp_path / "model.safetensors"
    )
    assets = tmp_path / "assets"
    assets.mkdir()
    (tmp_path / "tokenizer.json").rename(assets / "tokenizer.json")
    tokenizer = json.loads((assets / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words |= {f"filler{i}": i for i in range(len(words) + 1, policy.config.vocab_size)} | {"<pad>": 0}
    image = {"id": policy.config.vocab_size, "content": "<image>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"] = [image | flags]
    (assets / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="no tokenizer"):
        load_lerobot(tmp_path, config=policy.config)
    loaded = load_lerobot(tmp_path, assets, config=policy.config)
    assert loaded.processing.tokens(("pick up",), np.zeros((1, 8)))[0][0, :3].tolist() == [2, 3, 4]
    loaded.processing = policy.processing
    assert_same(loaded, policy)


@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
def test_lerobot_layout(tmp_path: Path, pi05: bool) -> None:
    policy = make_policy(pi05=pi05)
    write_lerobot(policy, tmp_path)
    loaded = load_lerobot(tmp_path, config=policy.config)
    assert loaded.processing.prompt_style == ("text_and_state" if pi05 else "lerobot_text")
    assert loaded.processing.state_norm.first == pytest.approx(policy.processing.state_norm.first)
    assert not loaded.processing.delta_actions
    loaded.processing = policy.processing
    assert_same(loaded, policy)


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


def with_word_level_tokenizer(policy: Policy, tmp_path: Path) -> Policy:
    """The same policy with a tokenizer that other systems can read."""
    write_word_level_tokenizer(tmp_path / "words.json")
    tokenizer = HuggingFaceTokenizer((tmp_path / "words.json").read_text())
    policy.processing = replace(policy.processing, tokenizer=tokenizer, token_len=policy.config.max_token_len)
    return policy


@pytest.mark.parametrize("heads", [False, True], ids=["network", "heads"])
@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
@pytest.mark.parametrize("to", ["openpi", "lerobot", "pi0rl"])
def test_converted_checkpoints_give_the_same_outputs(tmp_path: Path, to: Target, pi05: bool, heads: bool) -> None:
    """Mixed dtypes, heads and processing included; the other system's own files say the same within rounding."""
    critic = (CriticConfig("expert", (16,)), NoiseHeadConfig((0.1, 0.3), (8,))) if heads else (None, None)
    policy = with_word_level_tokenizer(make_policy(*critic, pi05), tmp_path)
    set_precision(policy, "bf16")
    # What both systems' files can express: openpi's LIBERO configs, and LeRobot's pipeline.
    native = openpi_like if to == "openpi" else lerobot_like
    policy.processing = native(policy)
    save_policy(policy, tmp_path / "source")
    lines = list(convert(str(tmp_path / "source"), tmp_path / "target", to, verify=True))
    assert "weights equal to the last bit, max difference 0 in images, 0 in tokens, 0 in state" in " ".join(lines)
    loaded = load_policy(tmp_path / "target")
    assert loaded.processing == policy.processing
    assert [t.dtype for t in loaded.state_dict().values()] == [t.dtype for t in policy.state_dict().values()]
    torch.testing.assert_close(act(loaded), act(policy), atol=1e-5, rtol=0)
    origin = json.loads((tmp_path / "target" / ORIGIN).read_text())
    assert origin["sha256"]["model.safetensors"] == sha256(tmp_path / "source/model.safetensors")
    if to != "pi0rl" and not heads:
        (tmp_path / "target/pi0rl.json").unlink()
        load = load_openpi if to == "openpi" else load_lerobot
        differences = compare(policy, load(tmp_path / "target", config=policy.config))
        assert max(differences[name] for name in ("network", "actions")) < BF16_ROUNDING
        assert differences["state"] < 1e-5
        assert (differences["tokens"], differences["images"]) == (0, 0)


def openpi_like(policy: Policy) -> Processing:
    norms = policy.processing.state_norm, policy.processing.action_norm
    if policy.config.pi05:
        norms = quantiles(norms[0], "openpi"), quantiles(norms[1], "openpi")
    return openpi_processing(policy.config, policy.processing.tokenizer, norms)


def lerobot_like(policy: Policy) -> Processing:
    state, action = policy.processing.state_norm, policy.processing.action_norm
    if policy.config.pi05:
        state, action = quantiles(state, "openpi"), quantiles(action, "openpi")
    style = "text_and_state" if policy.config.pi05 else "lerobot_text"
    changes = {"prompt_style": style, "resize": "torch", "delta_actions": not policy.config.pi05}
    return replace(policy.processing, state_norm=state, action_norm=action, **changes)


def quantiles(norm: Normalisation, convention: str) -> Normalisation:
    low = [value - 2 for value in norm.first]
    return Normalisation("quantile", tuple(low), tuple(value + 4 for value in low), convention)


def test_processing_files_beside_a_converted_checkpoint_cannot_be_changed_unnoticed(tmp_path: Path) -> None:
    save_openpi(with_word_level_tokenizer(make_policy(), tmp_path), tmp_path / "policy")
    file = tmp_path / "policy" / NORM_STATS
    file.write_text(file.read_text().replace("norm_stats", "other_stats"))
    with pytest.raises(UserError, match=r"norm_stats.json: missing or changed since pi0rl.json"):
        load_policy(tmp_path / "policy")


def test_shards_are_read_like_one_file(tmp_path: Path) -> None:
    policy = with_word_level_tokenizer(make_policy(), tmp_path)
    save_openpi(policy, tmp_path / "policy")
    tensors = load_file(tmp_path / "policy/model.safetensors")
    (tmp_path / "policy/model.safetensors").unlink()
    names = sorted(tensors)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, tmp_path / "policy" / file)
    assert_same(load_policy(tmp_path / "policy"), policy)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (tmp_path / "policy/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(load_policy(tmp_path / "policy"), policy)
    (tmp_path / "policy/model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"index.json: model-00002-of-00002.safetensors is missing"):
        load_policy(tmp_path / "policy")


def test_inspection_names_what_matters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_policy(make_policy(CriticConfig("expert", (16,))), tmp_path / "own")
    assert main(["checkpoint", "convert", str(tmp_path / "own"), str(tmp_path / "out"), "--to", "lerobot"]) == 0
    assert main(["checkpoint", "inspect", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    for part in (
        "lerobot",
        "tiny",
        "3 layers of 128",
        "in float32",
        "value head 16 on the expert",
        "mean_std",
        "sha256",
    ):
        assert part in said
    assert f"directory {tmp_path / 'own'}" in said
    assert main(["checkpoint", "convert", str(tmp_path / "own"), str(tmp_path / "out"), "--to", "openpi"]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
