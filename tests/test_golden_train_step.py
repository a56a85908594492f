"""One whole update, from the raw rollout to the changed weights, against RLinf's actor on a tiny pi0 and pi0.5."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from goldens import GOLDEN, architecture, fixtures, hidden_widths, nearest, network_of, read_json, scan, with_suffix
from safetensors.torch import load_file
from torch import Tensor

from pi0rl.observation import Observation
from pi0rl.policy.critic import CriticConfig, NoiseHeadConfig
from pi0rl.policy.foreign import canonical
from pi0rl.policy.model import ModelInputs
from pi0rl.policy.policy import Policy
from pi0rl.policy.processing import mean_std, tiny_processing
from pi0rl.policy.sampling import SamplerConfig, evaluate_chains
from pi0rl.policy.weights import assign
from pi0rl.rl.advantages import make_batch
from pi0rl.rl.config import AlgorithmConfig, OptimConfig, UpdateConfig
from pi0rl.rl.metrics import RLINF_NAMES
from pi0rl.rl.optimizer import PolicyOptimizer
from pi0rl.rl.trajectories import Rollout, Trajectory
from pi0rl.rl.update import Evaluate, Evaluation, update

pytestmark = pytest.mark.golden

IGNORED_KEYS = {"loss_agg_func", "entropy_type"}
LOGGED_AS = {theirs: ours for ours, theirs in RLINF_NAMES.items()}


def start_policy(case: Path, model: dict, changes: dict[str, Tensor]) -> Policy:
    """The policy the reference started from: the nearest network and heads of the changed weights' names and shapes."""
    weights, heads_file = starting_point(case, changes)
    config, heads = architecture(weights), load_file(heads_file)
    tensors = canonical(load_file(weights / "model.safetensors"))
    critic = CriticConfig(
        source="prefix" if model.get("value_after_vlm") else "expert",
        hidden=hidden_widths(heads, "value_head."),
        detach=bool(model["detach_critic_input"]),
    )
    noise = None
    if model["noise_method"] == "flow_noise":
        noise = NoiseHeadConfig(tuple(model["noise_logvar_range"]), hidden_widths(heads, "noise_head."))
    wanted = ("value_head.",) * model["add_value_head"] + ("noise_head.",) * (noise is not None)
    tensors |= {name: tensor for name, tensor in heads.items() if name.startswith(wanted)}
    unused = mean_std(np.zeros((2, 1)))
    processing = tiny_processing(config, unused, unused, prompts=("push",))
    policy = Policy(config, processing, critic if model["add_value_head"] else None, noise)
    assign(policy, tensors | constant_buffers(policy), weights)
    return policy


def starting_point(case: Path, changes: dict[str, Tensor]) -> tuple[Path, Path]:
    """Folder of the network, and the file of the heads."""
    found = {}
    for heads in sorted({file for f in scan(GOLDEN) for file in f.files if file.name == "heads.safetensors"}):
        base = network_of(heads.parent, pi05=any("dense" in name for name in changes))
        stored = load_file(base / "model.safetensors") | load_file(heads)
        if all(name in stored and stored[name].shape == change.shape for name, change in changes.items()):
            found[heads] = base
    heads = nearest(list(found), case, "the network it started from")
    return found[heads], heads


def constant_buffers(policy: Policy) -> dict[str, Tensor]:
    """flow_noise's bounds, which the fixtures give as configuration."""
    return dict(policy.named_buffers())


def rollout_of(arrays: dict[str, Tensor], epochs: int, group_size: int, joint: bool) -> tuple[Rollout, dict]:
    """Every column of the padded rollout as a trajectory that goes on after its end; and the prompts, time-major."""
    raw = {
        name.removeprefix("raw."): torch.cat(list(array.chunk(epochs)), dim=1)
        for name, array in arrays.items()
        if name.startswith("raw.")
    }
    seen = {name.removeprefix("forward_inputs."): array.numpy() for name, array in raw.items()}
    rewards = seen["rewards"]
    trajectories = [
        Trajectory(
            episode=b,
            group=b // group_size,
            simulated=rewards[:, b].size,
            rewards=rewards[:, b],
            success=np.zeros_like(seen["dones"][1:, b]),
            dones=seen["dones"][1:, b],
            log_probs=seen["prev_logprobs"][:, b, None],
            values=seen["prev_values"][:-1, b, 0],
            chains=seen["chains"][:, b],
            denoise_inds=seen["denoise_inds"][:, b] if joint else seen["denoise_inds"][:, b, :1],
            observation=Observation(
                seen["observation/image"][:, b],
                seen["observation/wrist_image"][:, b],
                seen["observation/state"][:, b],
                ("",) * len(rewards),
            ),
        )
        for b in range(rewards.shape[1])
    ]
    prompts = {
        name: raw[f"forward_inputs.{name}"].flatten(0, 1) for name in ("tokenized_prompt", "tokenized_prompt_mask")
    }
    return Rollout(trajectories), prompts


def evaluator(policy: Policy, rollout: Rollout, prompts: dict[str, Tensor], sampler: SamplerConfig) -> Evaluate:
    """Recompute samples as the reference's stubbed input transform does: images unrotated, the state only padded."""

    def evaluate(samples: Tensor) -> Evaluation:
        rows = rollout.inputs(samples.tolist())
        look = rows.observation
        cameras = [
            torch.from_numpy(image).permute(0, 3, 1, 2) / 255.0 * 2.0 - 1.0
            for image in (look.base_image, look.wrist_image)
        ]
        inputs = ModelInputs(
            images=torch.stack([*cameras, torch.full_like(cameras[0], -1.0)], dim=1),
            image_mask=torch.tensor([True, True, False]).expand(len(samples), -1),
            tokens=prompts["tokenized_prompt"][samples],
            token_mask=prompts["tokenized_prompt_mask"][samples],
            state=torch.nn.functional.pad(
                torch.from_numpy(look.state), (0, policy.config.state_dim - look.state.shape[1])
            ),
        )
        chains, inds = torch.from_numpy(rows.chains), torch.from_numpy(rows.denoise_inds)
        result = evaluate_chains(policy, inputs, chains, inds, sampler)
        return Evaluation(result.log_probs, result.values, result.entropy)

    return evaluate


@pytest.mark.parametrize("case", fixtures("train_step"))
def test_train_step(case: Path) -> None:
    reference = read_json(with_suffix(case, ".json"))
    arrays = load_file(with_suffix(case, ".safetensors"))
    changes = {name.removeprefix("delta."): array for name, array in arrays.items() if name.startswith("delta.")}
    cfg, model = reference["cfg"], reference["model_cfg"]
    actor, env = cfg["actor"], cfg["env"]["train"]
    config = UpdateConfig(
        AlgorithmConfig(
            compat="rlinf", **{key: cfg["algorithm"][key] for key in cfg["algorithm"].keys() - IGNORED_KEYS}
        ),
        OptimConfig(**actor["optim"], critic_warmup_steps=reference["critic_warmup_steps"]),
        global_batch_size=actor["global_batch_size"],
        micro_batch_size=actor["micro_batch_size"],
        seed=actor["seed"],
    )
    joint = model.get("joint_logprob", False)
    rollout, prompts = rollout_of(arrays, env["rollout_epoch"], config.algorithm.group_size, joint)
    batch = make_batch(rollout, config.algorithm, env["max_episode_steps"])
    for name, array in {"advantages": batch.advantages, "returns": batch.returns, "loss_mask": batch.mask}.items():
        if f"adv.{name}" in arrays:
            torch.testing.assert_close(array, arrays[f"adv.{name}"].flatten(0, 1), atol=1e-5, rtol=1e-5)

    policy = start_policy(case, model, changes)
    trainable = policy.trainable_parameters(model["train_expert_only"])
    critic = {name: parameter for name, parameter in trainable.items() if name.startswith("value_head.")}
    optimizer = PolicyOptimizer({k: v for k, v in trainable.items() if k not in critic}, critic, config.optim)
    before = {name: parameter.detach().clone() for name, parameter in trainable.items()}
    sampler = SamplerConfig(
        method=model["noise_method"],
        num_steps=model["num_steps"],
        action_chunk=actor["model"]["num_action_chunks"],
        env_action_dim=actor["model"]["action_dim"],
        noise_level=model.get("noise_level", 0.0),
        stochastic="joint" if joint else "single",
    )
    report = update(evaluator(policy, rollout, prompts, sampler), batch, optimizer, config, iteration=0)

    for step, expected in zip(report.steps, reference["per_optimizer_step"], strict=True):
        assert step.norms.actor == pytest.approx(expected["grad_norm"], rel=2e-3)
        assert [step.actor_lr, step.value_lr][: len(expected["lr"])] == pytest.approx(expected["lr"])
    accumulation = config.global_batch_size // config.micro_batch_size
    expected = dict(reference["mean_metrics"])
    assert report.metrics["actor/loss"] / accumulation == pytest.approx(
        expected.pop("actor/total_loss"), rel=2e-3, abs=1e-4
    )
    expected.pop("critic/value_clip_ratio", None)
    for theirs, value in expected.items():
        assert report.metrics[LOGGED_AS[theirs]] == pytest.approx(value, rel=2e-3, abs=1e-4), theirs
    compare_updates(trainable, before, arrays, reference["trainable"])


def compare_updates(
    trainable: dict[str, torch.nn.Parameter], before: dict[str, Tensor], arrays: dict[str, Tensor], names: list[str]
) -> None:
    """Relative L2 error of all parameters' changes together, at most 1e-3; the unused head stays."""
    unused = {name for name in names if name.endswith("gemma_expert.lm_head.weight")}
    assert set(trainable) == set(names) - unused
    assert all(not arrays[f"delta.{name}"].any() for name in unused)
    error, size = 0.0, 0.0
    for name, parameter in trainable.items():
        expected = arrays[f"delta.{name}"]
        error += float(((parameter.detach() - before[name] - expected) ** 2).sum())
        size += float((expected**2).sum())
    assert (error / size) ** 0.5 < 1e-3
