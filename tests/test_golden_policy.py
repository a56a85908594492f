"""Network, samplers, log-probs, critics and their gradients against openpi and RLinf on tiny random models."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from goldens import (
    GOLDEN,
    architecture,
    close,
    fixtures,
    hidden_widths,
    model_inputs,
    network,
    network_of,
    read_json,
    with_suffix,
)
from safetensors.torch import load_file
from torch import Tensor

from pi0rl.policy.config import PI0, PI05, Pi0Config
from pi0rl.policy.critic import CriticConfig, NoiseHeadConfig, pool_prefix
from pi0rl.policy.export import save_lerobot, save_openpi
from pi0rl.policy.foreign import canonical
from pi0rl.policy.model import ModelInputs, time_embedding
from pi0rl.policy.policy import Policy
from pi0rl.policy.precision import storage_dtype
from pi0rl.policy.processing import mean_std, tiny_processing
from pi0rl.policy.sampling import (
    SamplerConfig,
    SamplingNoise,
    annealed_noise_level,
    evaluate_chains,
    sample,
    step_coefficients,
    time_grid,
)
from pi0rl.policy.weights import assign

pytestmark = pytest.mark.golden

NETWORKS = fixtures("network")
SAMPLERS = fixtures("sampler")


@pytest.mark.parametrize("folder", NETWORKS)
def test_prefix(folder: Path) -> None:
    model, expected = network(folder), load_file(folder / "outputs.safetensors")
    inputs = model_inputs(load_file(folder / "inputs.safetensors"))
    embeddings, mask = model.embed_prefix(inputs)
    prefix, output = model.prefix(inputs, with_output=True)
    assert output is not None
    assert torch.equal(mask, expected["prefix_pad_masks"])
    close(embeddings, expected["prefix_embs"], 1e-4)
    close(output, expected["prefix_output"], 1e-4)
    for layer, pair in enumerate(prefix.cache):
        for name, actual in zip(("key", "value"), pair, strict=True):
            close(actual, expected[f"prefix_cache.{layer}.{name}"], 1e-4)


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "without_padding"])
@pytest.mark.parametrize("folder", NETWORKS)
def test_velocity(folder: Path, padded: bool) -> None:
    model, expected = network(folder), load_file(folder / "outputs.safetensors")
    arrays = load_file(folder / "inputs.safetensors")
    inputs = model_inputs(arrays) if padded else model_inputs(arrays).without_padding()
    prefix, _ = model.prefix(inputs)
    times = [name.removeprefix("v_t/t=") for name in expected if name.startswith("v_t/")]
    for name in times:
        time = arrays["time"] if name == "mixed" else torch.full_like(arrays["time"], float(name))
        t = time[:, None, None]
        x_t = t * arrays["noise"] + (1 - t) * arrays["actions"]
        tokens, condition = model.embed_suffix(inputs.state, x_t, time)
        velocity, features = model.velocity(prefix, x_t, time)
        close(tokens, expected[f"suffix_embs/t={name}"], 1e-4)
        close(velocity, expected[f"v_t/t={name}"], 1e-4)
        if condition is not None:
            close(condition, expected[f"adarms_cond/t={name}"], 1e-4)
            close(features, expected[f"suffix_output/t={name}"], 1e-4)
    embedded = expected["time_emb/mixed_float64"]
    close(time_embedding(arrays["time"].double(), embedded.shape[1]), embedded, 1e-9)


@pytest.mark.parametrize("folder", fixtures("gradients"))
def test_loss_and_gradients(folder: Path) -> None:
    model, arrays = network(folder), load_file(folder / "inputs.safetensors")
    loss = model.flow_matching_loss(model_inputs(arrays), arrays["actions"], arrays["noise"], arrays["time"])
    close(loss, load_file(folder / "outputs.safetensors")["loss_per_element"], 1e-3)
    loss.mean().backward()
    own = dict(model.named_parameters())
    for name, expected in load_file(folder / "grads.safetensors").items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(own[name].grad, expected, rtol=2e-3, atol=1e-5 * scale)
    norms = read_json(folder / "grad_norms.json")
    for name, parameter in own.items():
        # A tied embedding is counted once, under either name; what nothing reads has no gradient or a zero one.
        norm = 0.0 if parameter.grad is None else float(parameter.grad.norm())
        expected = norms.get(name) or norms.get(name.replace("model.language_model.embed_tokens", "lm_head")) or 0.0
        assert norm == pytest.approx(expected, rel=2e-3, abs=1e-6), name


@pytest.mark.parametrize("folder", NETWORKS)
def test_euler_sampling(folder: Path) -> None:
    """openpi accumulates time in float32; flow_ode's grid differs by 1e-7, which its time features amplify."""
    arrays, policy = load_file(folder / "inputs.safetensors"), golden_policy(folder, None, {}, {})
    for name, expected in load_file(folder / "outputs.safetensors").items():
        if name.startswith("sample_actions/"):
            steps = int(name.split("=")[1])
            still = torch.zeros(len(expected), steps, *expected.shape[1:])
            noise = SamplingNoise(arrays["noise"], still, torch.zeros(len(expected)))
            config = SamplerConfig("flow_ode", num_steps=steps)
            close(sample(policy, model_inputs(arrays), noise, config, "eval").actions, expected, 2e-4)


@pytest.mark.parametrize("folder", NETWORKS)
def test_euler_sampling_on_openpi_s_times(folder: Path) -> None:
    """openpi adds its times up in float32; on these very times its actions come out."""
    model, arrays = network(folder), load_file(folder / "inputs.safetensors")
    with torch.no_grad():
        prefix, _ = model.prefix(model_inputs(arrays).without_padding())
        for name, expected in load_file(folder / "outputs.safetensors").items():
            if name.startswith("sample_actions/"):
                step = torch.tensor(-1.0 / int(name.split("=")[1]))
                x, time = arrays["noise"], torch.tensor(1.0)
                while time >= -step / 2:
                    x = x + step * model.velocity(prefix, x, time.expand(len(x)))[0]
                    time = time + step
                close(x, expected, 1e-4)


def golden_policy(base: Path, case: dict | None, heads: dict[str, Tensor], options: dict) -> Policy:
    """The fixture's network with the heads its configuration asks for."""
    config = architecture(base)
    critic = noise = None
    tensors = canonical(load_file(base / "model.safetensors"))
    if options.get("add_value_head"):
        critic = CriticConfig(
            source="prefix" if options.get("value_after_vlm") else "expert",
            hidden=hidden_widths(heads, "value_head."),
            detach=bool(options.get("detach_critic_input")),
            chunk_only=bool(options.get("chunk_critic_input")),
            pooling=options.get("value_vlm_mode", "mean_token"),
            num_cameras=(case or {}).get("num_images_in_input", 2),
        )
        tensors |= {name: tensor for name, tensor in heads.items() if name.startswith("value_head.")}
    if options.get("noise_method") == "flow_noise":
        noise = NoiseHeadConfig(tuple(options["noise_logvar_range"]), hidden_widths(heads, "noise_head."))
        tensors |= {name: tensor for name, tensor in heads.items() if name.startswith("noise_head.")}
    unused = mean_std(np.zeros((2, 1)))
    policy = Policy(config, tiny_processing(config, unused, unused, prompts=("push",)), critic, noise)
    assign(policy, tensors | dict(policy.named_buffers()), base)
    return policy


def sampler_of(case: dict) -> SamplerConfig:
    options = case["config"]
    level = options.get("noise_level", 0.0)
    if options.get("noise_anneal"):
        start, end, over = options["noise_params"]
        level = annealed_noise_level(start, end, over, case["global_step"])
    return SamplerConfig(
        method=options["noise_method"],
        num_steps=options["num_steps"],
        action_chunk=case["action_chunk"],
        env_action_dim=case["env_dim"],
        noise_level=level,
        stochastic="joint" if options.get("joint_logprob") else "single",
        ignore_last=bool(options.get("ignore_last")),
        squared_error_log_prob=bool(options.get("safe_get_logprob")),
    )


def heads_of(stem: Path) -> dict[str, Tensor]:
    return load_file(stem.parent / "heads.safetensors")


def load_case(stem: Path) -> tuple[dict, dict[str, Tensor], Policy, ModelInputs, SamplerConfig]:
    case, arrays = read_json(with_suffix(stem, ".json")), load_file(with_suffix(stem, ".safetensors"))
    base = network_of(stem.parent, pi05="pi05" in case["config"].get("config_name", ""))
    policy = golden_policy(base, case, heads_of(stem), case["config"])
    return case, arrays, policy, model_inputs(load_file(base / "inputs.safetensors")), sampler_of(case)


@pytest.mark.parametrize("stem", SAMPLERS)
def test_rollout(stem: Path) -> None:
    case, arrays, policy, inputs, config = load_case(stem)
    batch, candidates = len(inputs), config.num_steps - (1 if config.ignore_last else 0)
    drawn = random.Random(case["python_random_seed"]).randint(0, candidates - 1)
    uniform = torch.full((batch,), (drawn + 0.5) / candidates)
    noise = SamplingNoise(arrays["x_init"], arrays["step_noise"], uniform)
    result = sample(policy, inputs, noise, config, case["mode"])
    if config.stochastic == "single":
        assert torch.equal(result.denoise_inds.expand(-1, config.num_steps), arrays["denoise_inds"])
    else:
        assert torch.equal(result.denoise_inds, arrays["denoise_inds"])
    close(result.chains, arrays["chains"], 5e-4)
    close(result.actions, arrays["actions"], 5e-4)
    close(result.log_probs[:, 0], arrays["prev_logprobs"], 2e-3)
    if policy.value_head is not None:
        close(result.values, arrays["prev_values"][:, 0], 1e-4)
    for name in (name for name in arrays if name.startswith("value.")):
        pooling = case["config"] | {"value_vlm_mode": name.removeprefix("value.")}
        variant = golden_policy(network_of(stem.parent, policy.config.pi05), case, heads_of(stem), pooling)
        close(sample(variant, inputs, noise, config, "eval").values, arrays[name], 1e-4)
    if "prefix_output_every16" in arrays:
        prefix, output = policy.model.prefix(inputs, with_output=True)
        assert output is not None
        assert torch.equal(prefix.mask, arrays["prefix_pad_masks"])
        close(output[:, ::16], arrays["prefix_output_every16"], 1e-4)
    if config.method != "flow_noise" and case["mode"] == "train":
        chosen = (arrays["denoise_inds"] == torch.arange(config.num_steps)).any(0)
        std = step_coefficients(config.method, config.num_steps, config.noise_level)[2] * chosen
        close(arrays["step_std"], std[None, :, None, None].expand_as(arrays["step_std"]), 1e-4)


@pytest.mark.parametrize("stem", SAMPLERS)
def test_every_denoising_step(stem: Path) -> None:
    """Mean, std, value and velocity of each step of the stored chains, in all 32 dimensions of the whole horizon."""
    _, arrays, policy, inputs, config = load_case(stem)
    chains, (batch, horizon, width) = arrays["chains"], arrays["actions"].shape
    with torch.no_grad():
        prefix = policy.prefix(inputs)
        for k in range(config.num_steps):
            drawn = bool((arrays["denoise_inds"] == k).any())
            one = replace(config, stochastic="all", method=config.method if drawn else "flow_ode")
            whole, inds = replace(one, action_chunk=horizon, env_action_dim=width), torch.full((batch, 1), k)
            step = evaluate_chains(policy, prefix, chains, inds, whole)
            close(step.mean[:, 0], arrays["step_mean"][:, k], 5e-4)
            close(step.std[:, 0], arrays["step_std"][:, k], 1e-4)
            if policy.critic_config is not None and policy.critic_config.source == "expert":
                close(evaluate_chains(policy, prefix, chains, inds, one).values, arrays["step_value"][:, k], 1e-4)
            if "step_v" in arrays:
                time = time_grid(config.num_steps)[k].expand(batch)
                close(policy.model.velocity(prefix, chains[:, k], time)[0], arrays["step_v"][:, k], 5e-4)


@pytest.mark.parametrize("stem", SAMPLERS)
def test_training_evaluation(stem: Path) -> None:
    """Log-probs, values and entropy of the stored chains with the same and with perturbed weights, and gradients."""
    case, arrays, policy, inputs, config = load_case(stem)
    if case["mode"] == "eval":
        return
    inds = arrays["denoise_inds"] if config.stochastic == "joint" else arrays["denoise_inds"][:, :1]
    check_evaluation("same", evaluate_chains(policy, inputs, arrays["chains"], inds, config), arrays, policy)
    whole = replace(config, action_chunk=arrays["actions"].shape[1], env_action_dim=arrays["actions"].shape[2])
    unsliced = evaluate_chains(policy, inputs, arrays["chains"], inds, whole).log_probs[:, 0]
    close(unsliced, arrays["same.raw_logprobs"].mean(1), 2e-3)

    weights = policy.named_weights()
    with torch.no_grad():
        weights["action_out_proj.weight"].mul_(1.01)
        weights["action_in_proj.bias"].add_(0.01)
        if policy.config.pi05:
            weights["time_mlp_out.bias"].add_(0.02)
    trainable = policy.trainable_parameters(case["config"]["train_expert_only"])
    if "trainable" in case:
        unused_head = "paligemma_with_expert.gemma_expert.lm_head.weight"
        assert set(trainable) == set(case["trainable"]) - {unused_head}
    result = evaluate_chains(policy, inputs, arrays["chains"], inds, config)
    check_evaluation("perturbed", result, arrays, policy)
    ratio = (result.log_probs - arrays["prev_logprobs"][:, None]).sum((1, 2, 3)).exp()
    w = torch.linspace(-1, 1, len(ratio))
    scalar = (ratio * w).mean() + (0.5 * (result.values - w) ** 2).mean() + 0.01 * result.entropy.mean()
    close(scalar, arrays["perturbed.scalar"], 2e-3)
    scalar.backward()
    for name, expected in arrays.items():
        if name.startswith("perturbed.grad."):
            actual = trainable[name.removeprefix("perturbed.grad.")].grad
            torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))
    for name, expected in read_json(with_suffix(stem, ".gradnorms.json")).items():
        if name in weights:
            gradient = weights[name].grad
            norm = 0.0 if gradient is None else float(gradient.norm())
            assert norm == pytest.approx(expected or 0.0, rel=1e-2, abs=1e-5), name


def check_evaluation(which: str, result, arrays: dict[str, Tensor], policy: Policy) -> None:
    close(result.log_probs[:, 0], arrays[f"{which}.logprobs"], 2e-3)
    close(result.entropy, arrays[f"{which}.entropy"].flatten(), 1e-4)
    if policy.value_head is not None:
        close(result.values, arrays[f"{which}.values"], 1e-4)


@pytest.mark.parametrize("folder", fixtures("vlm_value"))
def test_critic_on_the_prefix(folder: Path) -> None:
    """The reference layout of all tokens at the real prefix length (pi0); every pooling, and a rollout with each."""
    arrays, weights = load_file(folder / "io.safetensors"), load_file(folder / "model.safetensors")
    heads = {name: tensor for name, tensor in weights.items() if name.startswith("value_head.")}
    named = {f"images_uint8.{name.removeprefix('in.')}": arrays[name] for name in arrays if name.endswith("_rgb")}
    batch, length = arrays["in.tokens"].shape
    masks = {f"image_masks.{name.split('.')[1]}": torch.full((batch,), "right" not in name) for name in named}
    words = {"tokenized_prompt": arrays["in.tokens"], "tokenized_prompt_mask": arrays["in.token_mask"]}
    inputs = model_inputs(named | masks | words | {"state": arrays["in.state"]})
    config = read_json(folder / "config.json")
    case = {"num_images_in_input": config["num_images_in_input"]}
    steps = arrays["step_noise"].shape[1]
    noise = SamplingNoise(arrays["noise"], arrays["step_noise"], torch.zeros(batch))
    for pooling in ("mean_token", "first_token", "last_token"):
        options = {"add_value_head": True, "value_after_vlm": True, "value_vlm_mode": pooling}
        policy = golden_policy(folder, case, heads, options)
        sampler = SamplerConfig("flow_sde", num_steps=steps, action_chunk=config["sizes"]["action_chunk"])
        result = sample(policy, inputs, noise, sampler, "eval")
        close(result.values, arrays[f"value.{pooling}"], 1e-4)
        close(result.values, arrays[f"prev_values.{pooling}"][:, 0], 1e-4)
    prefix, output = network(folder).prefix(inputs, with_output=True)
    assert output is not None
    assert torch.equal(prefix.mask, arrays["prefix_pad"])
    close(output[:, ::16], arrays["prefix_output_every16"], 1e-4)
    valid_only = CriticConfig("prefix", pooling="mean_valid")
    valid = pool_prefix(output, prefix.mask, length, policy.config.vision.num_patches, valid_only)
    close(valid[0], output[0, prefix.mask[0]].mean(0), 1e-5)


@pytest.mark.parametrize("folder", fixtures("bf16"))
def test_mixed_precision(folder: Path) -> None:
    """RLinf's mixture of bfloat16 and float32, key by key; bfloat16 sums depend on their order, hence the tolerance."""
    arrays, policy = load_file(folder / "inputs.safetensors"), golden_policy(folder, None, {}, {})
    dtypes = canonical(read_json(folder / "dtypes_bf16.json"))
    for name, parameter in policy.named_weights().items():
        parameter.data = parameter.data.to(getattr(torch, dtypes[name].removeprefix("torch.")))
    for name, expected in load_file(folder / "outputs_bf16.safetensors").items():
        if name.startswith("sample_actions/"):
            steps = int(name.split("=")[1])
            noise = SamplingNoise(
                arrays["noise"], expected.new_zeros(len(expected), steps, *expected.shape[1:]), arrays["time"]
            )
            close(
                sample(policy, model_inputs(arrays), noise, SamplerConfig("flow_ode", num_steps=steps), "eval").actions,
                expected,
                5e-2,
            )


@pytest.mark.parametrize(("variant", "config"), [("pi0", PI0), ("pi05", PI05)])
def test_the_full_size_has_the_reference_s_weights(variant: str, config: Pi0Config) -> None:
    """Names, shapes and dtypes of the published sizes, and which of them RLinf trains."""
    lists = [GOLDEN.parent / name for name in (f"openpi_{variant}_full_keys.json", f"rlinf_{variant}_extra_keys.json")]
    if not all(file.is_file() for file in lists):
        pytest.skip(f"{lists[0]} is not there")
    openpi, rlinf = (read_json(file) for file in lists)
    pi05 = config.pi05
    critic = CriticConfig("prefix", (1024, 512, 256), detach=False) if pi05 else CriticConfig()
    unused = mean_std(np.zeros((2, 1)))
    with torch.device("meta"):
        processing = tiny_processing(config, unused, unused, prompts=("push",))
        policy = Policy(config, processing, critic, None if pi05 else NoiseHeadConfig())
    expected = canonical(openpi["keys"]) | rlinf["extra_value_after_vlm" if pi05 else "extra"]
    own = {}
    for name, tensor in policy.state_dict().items():
        dtype = storage_dtype(name, "bf16")
        own[name.removeprefix("model.")] = [list(tensor.shape), str(dtype).removeprefix("torch.")]
    assert own == expected
    trained = set(policy.trainable_parameters(train_expert_only=True))
    assert trained == set(rlinf["trainable"]) - {"paligemma_with_expert.gemma_expert.lm_head.weight"}


@pytest.mark.parametrize("folder", NETWORKS)
def test_written_checkpoints_have_the_reference_s_names(folder: Path, tmp_path: Path) -> None:
    policy = golden_policy(folder, None, {}, {})
    stored = load_file(folder / "model.safetensors")
    save_openpi(policy, tmp_path / "openpi")
    written = load_file(tmp_path / "openpi/model.safetensors")
    assert {name: tensor.shape for name, tensor in written.items()} == {n: t.shape for n, t in stored.items()}
    assert all(torch.equal(written[name], stored[name]) for name in stored if "gemma_expert.lm_head" not in name)
    save_lerobot(policy, tmp_path / "lerobot")
    embedding = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
    assert set(load_file(tmp_path / "lerobot/model.safetensors")) == {f"model.{n}" for n in (*stored, embedding)}


@pytest.mark.parametrize("folder", fixtures("lerobot_network"))
def test_written_lerobot_files_say_what_lerobot_s_do(folder: Path, tmp_path: Path) -> None:
    base = network_of(folder, pi05=read_json(folder / "config.json")["type"] == "pi05")
    save_lerobot(golden_policy(base, None, {}, {}), tmp_path / "policy")
    assert set(load_file(tmp_path / "policy/model.safetensors")) == set(read_json(folder / "keys.json"))
    ours, theirs = (read_json(place / "config.json") for place in (tmp_path / "policy", folder))
    assert set(ours) <= set(theirs)
    for key in ("type", "chunk_size", "image_resolution", "max_action_dim", "max_state_dim"):
        assert ours[key] == theirs[key], key
