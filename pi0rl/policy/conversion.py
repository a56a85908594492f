"""``pi0rl checkpoint convert``: one layout to another, and the proof that it is the same policy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from pi0rl.errors import UserError
from pi0rl.files import replace_text
from pi0rl.observation import Observation
from pi0rl.policy.checkpoints import layout_of, load_policy, save_policy
from pi0rl.policy.export import lerobot_differences, openpi_differences, save_lerobot, save_openpi
from pi0rl.policy.foreign import load_openpi
from pi0rl.policy.lerobot import load_lerobot
from pi0rl.policy.policy import Policy
from pi0rl.policy.sampling import SamplerConfig, SamplingNoise, sample
from pi0rl.policy.sources import ORIGIN, origin_of, resolve
from pi0rl.policy.weights import policy_tensors

Target = Literal["pi0rl", "openpi", "lerobot"]
_SAVE = {"pi0rl": save_policy, "openpi": save_openpi, "lerobot": save_lerobot}
_DIFFERENCES = {"openpi": openpi_differences, "lerobot": lerobot_differences}
_NATIVE = {"openpi": load_openpi, "lerobot": load_lerobot}
_STEPS = 4
# Equal weights may lie at other addresses of the files they are mapped from, and products then round differently.
FP32_ROUNDING, BF16_ROUNDING = 1e-5, 5e-2


def convert(source: str, target: Path, to: Target, verify: bool, assets: Path | None = None) -> Iterator[str]:
    """Write ``source`` to the new folder ``target``; yields lines about what was done.

    With ``verify`` it is read back and compared: weights and inputs to the last bit, outputs on a fixed batch up to
    rounding; a UserError where they differ.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists and is not empty, expected a new folder; choose another or remove it first")
    found = resolve(source)
    policy = load_policy(str(found.directory), assets)
    target.parent.mkdir(parents=True, exist_ok=True)
    _SAVE[to](policy, target)
    origin = origin_of(found, layout_of(found.directory))
    replace_text(target / ORIGIN, json.dumps(origin, indent=1) + "\n")
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    yield f"{target}: written in {to}'s layout, {size / 1e9:.3g} GB"
    if to in _DIFFERENCES:
        yield from (f"note: {difference}" for difference in _DIFFERENCES[to](policy))
    if verify:
        yield from _verify(policy, target, to)


def _verify(policy: Policy, target: Path, to: Target) -> Iterator[str]:
    copy = load_policy(target)
    changed, differences = _changed_weight(policy, copy), compare(policy, copy)
    yield f"read back: weights {'equal to the last bit' if changed is None else 'differ'}, " + _summary(differences)
    if changed is not None:
        raise UserError(f"{target}: read back, weight {changed} differs from the source, expected equal; do not use it")
    rounding = BF16_ROUNDING if policy.model.expert.dtype == torch.bfloat16 else FP32_ROUNDING
    allowed = {"images": 0.0, "tokens": 0.0, "state": 0.0}
    if any(value > allowed.get(name, rounding) for name, value in differences.items()):
        raise UserError(
            f"{target}: read back it differs from the source ({_summary(differences)}), expected 0; do not use it"
        )
    if to in _NATIVE:
        try:
            native = compare(policy, _NATIVE[to](target, config=policy.config))
        except UserError as error:
            yield f"as {to} alone describes it: not comparable ({error})"
        else:
            yield f"as {to} alone describes it: " + _summary(native)


def _changed_weight(one: Policy, other: Policy) -> str | None:
    """The first weight that is not the same in both, bit by bit and in dtype."""
    first, second = policy_tensors(one), policy_tensors(other)
    for name in sorted(first.keys() | second.keys()):
        a, b = first.get(name), second.get(name)
        if a is None or b is None or a.dtype != b.dtype or not torch.equal(a, b):
            return name
    return None


def _summary(differences: dict[str, float]) -> str:
    return "max difference " + ", ".join(f"{value:.3g} in {name}" for name, value in differences.items())


def compare(one: Policy, other: Policy) -> dict[str, float]:
    """Largest absolute differences between two policies on a fixed batch: inputs, actions, values where both have them.

    inf where shapes differ.
    """
    with torch.no_grad():
        first, second = _outputs(one), _outputs(other)
    result = {}
    for name in [name for name in first if name in second]:
        a, b = first[name], second[name]
        result[name] = float(np.abs(a - b).max()) if a.shape == b.shape else float("inf")
    return result


def _outputs(policy: Policy) -> dict[str, np.ndarray]:
    """What the policy makes of two made-up looks and fixed noise, float64."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 2, 256, 256, 3), dtype=np.uint8)
    prompts = ("pick up the black bowl and place it on the plate", "turn on the stove")
    observation = Observation(images[0], images[1], rng.normal(size=(2, 8)).astype(np.float32), prompts)
    inputs = policy.processing.inputs(observation)
    config = policy.config
    shape = (2, _STEPS + 1, config.action_horizon, config.action_dim)
    noise = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
    sampler = SamplerConfig("flow_ode", num_steps=_STEPS)
    drawn = sample(policy, inputs, SamplingNoise(noise[:, 0], noise[:, 1:], torch.zeros(2)), sampler, "eval")
    arrays = {
        "images": inputs.images.numpy(),
        "tokens": inputs.tokens.numpy(),
        "state": inputs.state.numpy(),
        "network": drawn.actions.numpy(),
        "actions": policy.processing.env_actions(drawn.actions, observation),
    }
    if policy.value_head is not None:
        arrays["values"] = drawn.values.numpy()
    return {name: array.astype(np.float64) for name, array in arrays.items()}
