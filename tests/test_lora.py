"""LoRA on the VLM: adapters and merged weights are the same policy, everywhere a policy goes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_policies import SDE, make_policy, noise_for, observe, with_random_adapters

from pi0rl.errors import UserError
from pi0rl.policy.checkpoints import load_policy, save_policy
from pi0rl.policy.conversion import compare
from pi0rl.policy.export import save_lerobot, save_openpi
from pi0rl.policy.lora import TARGETS, LoraConfig, add_lora
from pi0rl.policy.policy import FROZEN_PREFIX, Policy
from pi0rl.policy.precision import set_precision
from pi0rl.policy.sampling import evaluate_chains, sample
from pi0rl.policy.weights import policy_tensors


def act(policy: Policy) -> torch.Tensor:
    return sample(policy, policy.processing.inputs(observe(8)), noise_for(range(8)), SDE, "eval").actions


@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
@pytest.mark.parametrize("save", [save_policy, save_openpi, save_lerobot])
def test_a_merged_checkpoint_is_an_ordinary_one(tmp_path: Path, save, pi05: bool) -> None:
    plain = make_policy(pi05=pi05)
    expected_names, before = set(policy_tensors(plain)), act(plain)
    adapted = with_random_adapters(plain)
    save(adapted, tmp_path / "policy")
    merged = load_policy(tmp_path / "policy")
    assert merged.lora_rank is None
    assert set(policy_tensors(merged)) == expected_names
    assert (act(adapted) - before).abs().max() > 0.01  # these adapters do something
    differences = compare(adapted, merged)
    assert differences.pop("network") < 1e-5
    assert differences.pop("actions") < 1e-5
    assert not any(differences.values())


def test_merging_in_bfloat16_rounds_once(tmp_path: Path) -> None:
    policy = make_policy()
    set_precision(policy, "bf16")
    adapted = with_random_adapters(policy)
    save_policy(adapted, tmp_path / "policy")
    merged = load_policy(tmp_path / "policy")
    assert merged.model.text.dtype == torch.bfloat16
    assert compare(adapted, merged)["network"] < 5e-2  # the references' tolerance for bfloat16
    trained = adapted.trainable_parameters(train_expert_only=True)
    assert {p.dtype for name, p in trained.items() if ".lora_" in name} == {torch.float32}


def test_fresh_adapters_change_nothing_and_follow_the_seed() -> None:
    plain, policies = act(make_policy()), []
    for seed in (1, 1, 2):
        policies.append(make_policy())
        add_lora(policies[-1], LoraConfig(4, seed))
        assert torch.equal(act(policies[-1]), plain)
    name = next(name for name in policies[0].named_weights() if ".lora_A." in name)
    first, again, other = (policy.named_weights()[name] for policy in policies)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with pytest.raises(UserError, match="has adapters of rank 4 already"):
        add_lora(policies[0], LoraConfig(4, 0))


@pytest.mark.parametrize("train_expert_only", [True, False])
def test_adapters_are_trained_and_the_vlm_is_not(train_expert_only: bool) -> None:
    policy = with_random_adapters(make_policy())
    trained = policy.trainable_parameters(train_expert_only)
    inside = [name for name in trained if name.startswith(FROZEN_PREFIX)]
    linears = [name for name in policy.named_weights() if name.endswith(".base_layer.weight")]
    assert all(".lora_" in name for name in inside)
    assert len(inside) == 2 * len(linears) == 2 * (2 * 6 + 3 * 7)  # layers of the tiny tower and text, TARGETS of each
    assert {name.split(".")[-3] for name in linears} == set(TARGETS)
    assert policy.trains_prefix(train_expert_only)
    frozen = {name: p.clone() for name, p in policy.named_weights().items() if name not in trained}
    inputs = policy.processing.inputs(observe(8))
    drawn = sample(policy, inputs, noise_for(range(8)), SDE, "train")
    evaluate_chains(policy, inputs, drawn.chains, drawn.denoise_inds, SDE).log_probs.mean().backward()
    unread = [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
    # Nothing reads what the VLM's last layer does after its keys and values.
    last = f"{FROZEN_PREFIX}model.language_model.layers.2."
    assert unread
    assert all(name.startswith(last) for name in unread)
    torch.optim.AdamW([p for p in trained.values() if p.grad is not None], lr=1e-2).step()
    assert all(torch.equal(p, frozen[name]) for name, p in policy.named_weights().items() if name in frozen)
