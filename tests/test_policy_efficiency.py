"""What is not computed or not kept, and that nothing but time and memory changes by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from goldens import close, fixtures, model_inputs, network, read_json
from safetensors.torch import load_file
from tiny_policies import PREFIX_CRITIC, SDE, make_policy, noise_for, observe

from pi0rl.policy.critic import CriticConfig, NoiseHeadConfig
from pi0rl.policy.model import ModelInputs, concatenate
from pi0rl.policy.policy import Policy
from pi0rl.policy.precision import set_precision
from pi0rl.policy.sampling import evaluate_chains, sample

LANGUAGE_LENGTHS = (3, 16, 17, 33, 40, 9, 31, 48)


def padded_inputs(policy: Policy, rows: int = 8) -> ModelInputs:
    """The reference layout: a third, masked camera of noise, and 48 language positions of which few are valid."""
    inputs = policy.processing.inputs(observe(rows))
    generator = torch.Generator().manual_seed(3)
    absent = torch.rand(rows, 1, *inputs.images.shape[2:], generator=generator)
    lengths = torch.tensor([LANGUAGE_LENGTHS[i % 8] for i in range(rows)])
    return replace(
        inputs,
        images=torch.cat((inputs.images, absent), dim=1),
        image_mask=torch.tensor([True, True, False]).expand(rows, 3),
        tokens=torch.randint(1, 100, (rows, 48), generator=generator),
        token_mask=torch.arange(48) < lengths[:, None],
    )


@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
def test_padding_is_not_computed(pi05: bool) -> None:
    policy = make_policy(pi05=pi05)
    inputs = padded_inputs(policy)
    whole, _ = policy.model.prefix(inputs)
    patches = policy.config.vision.num_patches
    assert whole.mask.shape[1] == 3 * patches + 48
    short = torch.tensor([0, 1, 5])  # at most 16 tokens
    assert policy.prefix(inputs.rows(short)).mask.shape[1] == 2 * patches + 16
    x, time = torch.randn(8, *noise_for(range(8)).initial.shape[1:]), torch.full((8,), 0.7)
    expected, _ = policy.model.velocity(whole, x, time)
    close(policy.model.velocity(policy.prefix(inputs), x, time)[0], expected, 1e-5)
    actual, _ = policy.model.velocity(policy.prefix(inputs.rows(short)), x[short], time[short])
    close(actual, expected[short], 1e-5)


def test_critics_that_pool_padding_get_it() -> None:
    inputs = padded_inputs(make_policy())
    for pooling, padded in (("mean_token", True), ("last_token", True), ("mean_valid", False), ("first_token", False)):
        policy = make_policy(CriticConfig("prefix", (16,), pooling=pooling))
        assert (policy.prefix(inputs).mask.shape[1] == 3 * policy.config.vision.num_patches + 48) == padded


def test_bits_do_not_depend_on_the_prompts_of_others() -> None:
    policy = make_policy(PREFIX_CRITIC)
    inputs = padded_inputs(policy, 16)
    together = sample(policy, inputs, noise_for(range(16)), SDE, "train")
    for row in range(16):
        alone = sample(policy, inputs.rows(torch.tensor([row])), noise_for([row]), SDE, "train")
        for name in ("actions", "chains", "log_probs", "values"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[row]), name


def test_prefixes_of_other_lengths_are_joined() -> None:
    policy = make_policy()
    inputs = padded_inputs(policy)
    parts = [policy.prefix(inputs.rows(rows)) for rows in torch.arange(8).split(3)]
    assert len({part.mask.shape[1] for part in parts}) > 1
    x, time = noise_for(range(8)).initial, torch.full((8,), 0.4)
    joined, _ = policy.model.velocity(concatenate(parts), x, time)
    close(joined, policy.model.velocity(policy.model.prefix(inputs)[0], x, time)[0], 1e-5)


@pytest.mark.parametrize("train_expert_only", [False, True])
@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
def test_gradient_checkpointing_changes_nothing_but_memory(pi05: bool, train_expert_only: bool) -> None:
    policy = make_policy(PREFIX_CRITIC, NoiseHeadConfig(hidden=(16,)), pi05)
    trainable = policy.trainable_parameters(train_expert_only)
    inputs = policy.processing.inputs(observe(4))
    drawn = sample(policy, inputs, noise_for(range(4)), SDE, "train")
    results, kept = [], []
    for enabled in (False, True):
        policy.model.set_gradient_checkpointing(enabled)
        policy.zero_grad()
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            evaluated = evaluate_chains(policy, inputs, drawn.chains, drawn.denoise_inds, SDE)
        loss = evaluated.log_probs.mean() + evaluated.values.mean() + evaluated.entropy.mean()
        loss.backward()
        results.append({name: parameter.grad for name, parameter in trainable.items()} | {"loss": loss.detach()})
        kept.append(sum(sizes.values()))
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, atol=0, rtol=0, msg=name)
    assert kept[1] < 0.7 * kept[0]


@pytest.mark.slow
@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
def test_compiled_layers_compute_the_same(pi05: bool) -> None:
    policy = make_policy(PREFIX_CRITIC, NoiseHeadConfig(hidden=(16,)), pi05)
    trainable = policy.trainable_parameters(train_expert_only=False)
    names, inputs, noise = list(policy.state_dict()), policy.processing.inputs(observe(4)), noise_for(range(4))
    results = []
    for compiled in (False, True):
        if compiled:
            policy.model.compile_layers()
            policy.model.set_gradient_checkpointing(True)
        assert policy.exact is not compiled
        policy.zero_grad()
        drawn = sample(policy, inputs, noise, SDE, "train")
        evaluated = evaluate_chains(policy, inputs, drawn.chains, drawn.denoise_inds, SDE)
        (evaluated.log_probs.mean() + evaluated.values.mean()).backward()
        gradients = {name: p.grad.clone() for name, p in trainable.items() if p.grad is not None}
        results.append({"actions": drawn.actions, "log-probs": evaluated.log_probs.detach()} | gradients)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, expected in results[0].items():
        # Some gradients are nothing but rounding, as those of keys' biases, which softmax takes out.
        scale = max(float(expected.abs().max()), largest if name in gradients else 0.0)
        torch.testing.assert_close(results[1][name], expected, rtol=1e-3, atol=1e-4 * scale, msg=name)
    assert list(policy.state_dict()) == names


def test_expert_only_training_keeps_no_graph_of_the_vlm() -> None:
    policy = make_policy(CriticConfig("expert", (16,)))
    policy.trainable_parameters(train_expert_only=True)
    prefix = policy.prefix(policy.processing.inputs(observe(2)))
    assert not any(tensor.requires_grad for pair in prefix.cache for tensor in pair)


@pytest.mark.golden
@pytest.mark.parametrize("folder", fixtures("network"))
def test_mixed_precision(folder: Path) -> None:
    """The references' dtypes exactly, and their outputs within the few digits that bfloat16 has."""
    if not (folder / "outputs_bf16.safetensors").is_file():
        pytest.skip(f"{folder} has no outputs in bfloat16")
    model = network(folder)
    set_precision(model, "bf16")
    expected = read_json(folder / "dtypes_bf16.json")
    for name, parameter in model.named_parameters():
        assert str(parameter.dtype) == expected.get(name, str(parameter.dtype)), name
    arrays, outputs = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs_bf16.safetensors")
    with torch.no_grad():
        prefix, _ = model.prefix(model_inputs(arrays).without_padding())
        for steps in (int(name.split("=")[1]) for name in outputs if name.startswith("sample_actions/")):
            x = arrays["noise"]
            for k in range(steps):
                x = x - model.velocity(prefix, x, torch.full((len(x),), 1 - k / steps))[0] / steps
            close(x, outputs[f"sample_actions/num_steps={steps}"], 5e-2)
    set_precision(model, "fp32")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
