"""Advantages, losses, schedules and small functions against arrays computed by the reference implementation (RLinf)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from goldens import close, fixtures, read_json, with_suffix
from safetensors.torch import load_file
from torch import Tensor

from pi0rl.rl import losses
from pi0rl.rl.advantages import compute_advantages, normalise
from pi0rl.rl.config import AlgorithmConfig, OptimConfig, UpdateConfig
from pi0rl.rl.metrics import RLINF_NAMES
from pi0rl.rl.schedules import learning_rate_factor
from pi0rl.rl.update import minibatches

pytestmark = pytest.mark.golden

LOGGED_AS = {theirs: ours for ours, theirs in RLINF_NAMES.items()}
MOMENTS = ("count", "returns_sum", "returns_sq_sum", "errors_sum", "errors_sq_sum")


def load(case: Path) -> tuple[dict, dict[str, Tensor]]:
    settings = read_json(with_suffix(case, ".json"))
    if settings["error"] is not None:
        pytest.skip(f"the reference refuses this case: {settings['error']}")
    return settings, load_file(with_suffix(case, ".safetensors"))


def fold_epochs(x: Tensor, epochs: int) -> Tensor:
    """[epochs * T, B, ...] as collected -> [T, epochs * B, ...]."""
    return torch.cat(list(x.chunk(epochs, dim=0)), dim=1)


def algorithm(adv_type: str, **keys: object) -> AlgorithmConfig:
    return AlgorithmConfig(adv_type=adv_type, loss_type="actor_critic" if adv_type == "gae" else "actor", **keys)


@pytest.mark.parametrize("stem", fixtures("advantages"))
def test_advantages(stem: Path) -> None:
    settings, arrays = load(stem)
    case = settings["case"]
    rewards, dones, values = (
        fold_epochs(arrays[f"raw.{key}"], case["rollout_epoch"]) for key in ("rewards", "dones", "prev_values")
    )
    config = algorithm(
        case["adv"],
        reward_type=case["reward_type"],
        logprob_type=case["reward_type"],
        group_size=case["group"],
        filter_rewards=case["filt"],
        gamma=settings["gamma"],
        gae_lambda=settings["gae_lambda"],
        rewards_lower_bound=settings["rewards_lower_bound"],
        rewards_upper_bound=settings["rewards_upper_bound"],
    )
    groups = torch.arange(rewards.shape[1]) // case["group"]
    result = compute_advantages(
        rewards, dones, values, groups, config, ignore_terminations=case["ign"] or case["auto_reset"]
    )
    close(result.advantages, arrays["out.advantages"], 1e-5)
    if "pre.loss_mask" in arrays:
        assert torch.equal(result.mask, arrays["pre.loss_mask"])
    if "pre.loss_mask_sum" in arrays:
        assert torch.equal(result.valid_steps, arrays["pre.loss_mask_sum"])
    if case["adv"] == "gae":
        assert result.returns is not None
        close(result.returns, arrays["out.returns"], 1e-5)
        close(result.returns - values[:-1], arrays["out.unnormalized_advantages"], 1e-5)


@pytest.mark.parametrize("stem", fixtures("losses"))
def test_losses(stem: Path) -> None:
    settings, arrays = load(stem)
    options = settings["options"]
    inputs = {key.removeprefix("in."): value for key, value in arrays.items() if key.startswith("in.")}
    shared = ("logprob_type", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c", "value_clip", "huber_delta")
    clamps = ("clip_log_ratio_min", "clip_log_ratio_max")
    with_critic = options["loss_type"] == "actor_critic"
    config = algorithm(
        "gae" if with_critic else "grpo", group_size=8, **{key: options[key] for key in (*shared, *clamps)}
    )
    mask = inputs.get("loss_mask", torch.ones_like(inputs["advantages"], dtype=torch.bool))
    weights = None
    if options["max_episode_steps"] is not None and "loss_mask" in inputs:
        weights = options["max_episode_steps"] / inputs["loss_mask_sum"]
    log_probs = inputs["logprobs"].clone().requires_grad_()
    loss, metrics = losses.actor_loss(
        log_probs[:, None], inputs["old_logprobs"][:, None], inputs["advantages"], mask, config, weights
    )
    if options["critic_warmup"]:
        loss = 0.0 * loss
        metrics["actor/policy_loss"] = torch.zeros(())
    values = inputs["values"].clone().requires_grad_()
    if with_critic:
        value_loss, value_metrics = losses.critic_loss(
            values, inputs["prev_values"], inputs["returns"], mask, config, weights
        )
        loss, metrics = loss + value_loss, metrics | value_metrics
        moments = losses.explained_variance_moments(values, inputs["returns"], mask)
        expected = [settings["metrics"][f"__sum__/_critic_explained_variance/{key}"] for key in MOMENTS]
        close(moments, torch.tensor(expected), 1e-5)
    loss.backward()
    close(loss, arrays["loss"], 1e-5)
    for gradient, tensor in {"grad_logprobs": log_probs, "grad_values": values}.items():
        if gradient in arrays:
            close(tensor.grad, arrays[gradient], 1e-5)
    if options["logprob_type"] == "token_level":
        # RLinf counts clipped tokens but divides by chunks; ours is a fraction.
        metrics["actor/pg_clipfrac"] = metrics["actor/pg_clipfrac"] * log_probs[0].numel()
    compare_metrics(metrics, settings["metrics"], 1e-5)


def compare_metrics(ours: dict, reference: dict, tolerance: float) -> None:
    """All of RLinf's metrics but the rounding noise that it calls value_clip_ratio."""
    for theirs, value in reference.items():
        if theirs != "critic/value_clip_ratio" and not theirs.startswith("__sum__"):
            torch.testing.assert_close(
                float(ours[LOGGED_AS[theirs]]),
                value,
                atol=tolerance,
                rtol=tolerance,
                msg=lambda m, t=theirs: f"{t}: {m}",
            )


@pytest.mark.parametrize("stem", fixtures("small_functions"))
def test_small_functions(stem: Path) -> None:
    arrays = load_file(with_suffix(stem, ".safetensors"))
    x, mask, ratio, values = (arrays.pop(key) for key in ("x", "mask", "ratio", "ev_values"))
    nothing, everything = torch.zeros_like(mask), torch.ones_like(mask)
    close(losses.masked_mean(x, mask), arrays.pop("masked_mean"), 1e-6)
    close(losses.masked_mean(x, nothing), arrays.pop("masked_mean_empty"), 1e-6)
    close(losses.masked_mean(x, everything), arrays.pop("masked_mean_none"), 1e-6)
    close(losses.aggregate(x, mask, 1.0 / ratio), arrays.pop("masked_mean_ratio"), 1e-6)
    close(normalise(x, mask), arrays.pop("safe_normalize"), 1e-6)
    close(normalise(x, nothing), arrays.pop("safe_normalize_empty"), 1e-6)
    explained = losses.explained_variance([losses.explained_variance_moments(values, x, mask)])
    assert explained == pytest.approx(float(arrays.pop("explained_variance")), abs=1e-6)
    entropy = arrays.pop("entropy_in")
    chunk = arrays["reshape_entropy_action_level"].shape[1]
    for key in list(arrays):
        if key.startswith("huber_"):
            close(losses.huber(3.0 * x, float(key.removeprefix("huber_"))), arrays.pop(key), 1e-6)
        elif key.startswith("kl_penalty_"):
            kind = {"k3": "low_var_kl"}.get(key.removeprefix("kl_penalty_"), key.removeprefix("kl_penalty_"))
            close(losses.kl_estimate(x, x.flip(0), kind), arrays.pop(key), 1e-6)
        elif key.startswith("reshape_entropy_"):
            expected = arrays.pop(key)
            level = key.removeprefix("reshape_entropy_")
            events = losses.sum_to_level(entropy.reshape(len(entropy), chunk, -1), level)
            close(events.reshape(expected.shape), expected, 1e-6)
    check_shuffle(arrays)
    assert not arrays, f"fixtures without a test: {sorted(arrays)}"


def check_shuffle(arrays: dict[str, Tensor]) -> None:
    """A rollout's samples, time-major and in the update's order, are the reference's flattened and shuffled ones."""
    (name,) = [key for key in arrays if key.startswith("shuffle_id_seed")]
    seed, count = (int(number) for number in re.findall(r"\d+", name))
    config = UpdateConfig(
        AlgorithmConfig(compat="rlinf", update_epoch=1), global_batch_size=count, micro_batch_size=count, seed=seed
    )
    (order,) = minibatches(count, config, iteration=3)
    assert torch.equal(order, arrays.pop(name))
    for key in [key for key in arrays if key.startswith("flat_in.")]:
        close(arrays.pop(key).flatten(0, 1)[:count][order], arrays.pop(key.replace("_in", "_out")), 0)


@pytest.mark.parametrize("file", fixtures("learning_rates"))
def test_learning_rate_schedule(file: Path) -> None:
    for case in read_json(file):
        config = OptimConfig(
            lr_scheduler=case["lr_scheduler"],
            lr_warmup_steps=case["num_warmup_steps"],
            total_training_steps=case["total_training_steps"],
            min_lr_rate=case["min_lr_rate"] or 0.0,
        )
        for step, expected in zip(case["rl_step"], case["lr"], strict=True):
            factor = learning_rate_factor(config, step, compat=True)
            assert [base * factor for base in case["base_lr"]] == pytest.approx(expected, rel=0, abs=1e-12)
