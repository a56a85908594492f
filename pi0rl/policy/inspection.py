"""``pi0rl checkpoint inspect``: what a checkpoint is, without anything but its files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pi0rl.policy.checkpoints import joint_digest, layout_of, load_policy, weights_of
from pi0rl.policy.config import Pi0Config
from pi0rl.policy.description import variant_name
from pi0rl.policy.policy import Policy
from pi0rl.policy.processing import Normalisation, Processing
from pi0rl.policy.sources import ORIGIN, resolve
from pi0rl.policy.weights import read_json, sha256

_WIDTH = 14


def inspect(source: str, assets: Path | None = None) -> Iterator[str]:
    """Lines about the checkpoint; raises UserError, after what can be told, where it cannot be loaded."""
    directory = resolve(source).directory
    layout = layout_of(directory)
    yield _line("layout", layout)
    digests = {str(file.relative_to(directory)): sha256(file) for file in weights_of(directory, layout)}
    for name, digest in digests.items():
        yield _line("file", f"{name}, {(directory / name).stat().st_size / 1e9:.3g} GB, sha256 {digest}")
    if len(digests) > 1:
        yield _line("all files", f"sha256 {joint_digest(digests)}")
    if (directory / ORIGIN).is_file():
        origin = read_json(directory / ORIGIN)
        commit = origin.get("commit") or origin.get("revision")
        trained = ", then trained by imitation" if origin.get("then") == "sft" else ""
        yield _line("origin", f"{origin['kind']} {origin['location']}{f' at {commit}' if commit else ''}{trained}")
    policy = load_policy(str(directory), assets)
    yield _line("variant", variant_name(policy.config) + (", of the pi0.5 family" if policy.config.pi05 else ""))
    yield from _sizes(policy.config)
    yield _line("parameters", _parameters(policy))
    yield _line("heads", _heads(policy))
    yield from _processing(policy.processing)


def _line(name: str, text: str) -> str:
    return f"{name:<{_WIDTH}}{text}"


def _sizes(config: Pi0Config) -> Iterator[str]:
    vision, text, expert = config.vision, config.text, config.expert
    yield _line(
        "vision",
        f"{vision.depth} layers of {vision.width}, {vision.num_heads} heads, {vision.image_size} px in patches of "
        f"{vision.patch_size}",
    )
    for name, stack in (("text", text), ("expert", expert)):
        heads = f"{stack.num_heads} heads of {stack.head_dim} ({stack.num_kv_heads} for keys)"
        yield _line(name, f"{stack.depth} layers of {stack.width}, MLP {stack.mlp_dim}, {heads}")
    yield _line(
        "horizon",
        f"{config.action_horizon} actions of {config.action_dim}, state of {config.state_dim}, vocabulary "
        f"{config.vocab_size}",
    )


def _parameters(policy: Policy) -> str:
    counts: Counter[str] = Counter()
    for parameter in policy.parameters():
        counts[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    parts = ", ".join(f"{count:,} in {dtype}" for dtype, count in counts.most_common())
    return f"{sum(counts.values()):,} ({parts})"


def _heads(policy: Policy) -> str:
    critic, noise = policy.critic_config, policy.noise_config
    value = "no value head"
    if critic is not None:
        read = f"{critic.source} and the time" if critic.append_time else critic.source
        value = f"value head {'-'.join(map(str, critic.hidden))} on the {read}"
    return f"{value}, {'no noise head' if noise is None else f'noise head with std in {list(noise.std_range)}'}"


def _processing(processing: Processing) -> Iterator[str]:
    tokenizer = processing.tokenizer
    yield _line(
        "tokenizer", f"{type(tokenizer).__name__}, {tokenizer.vocab_size} ids, {processing.token_len} positions"
    )
    actions = "relative to the state" if processing.delta_actions else "as predicted"
    yield _line("prompt", processing.prompt_style)
    yield _line("images", f"rotated by 180 degrees, {processing.image_size} px by {processing.resize}")
    yield _line("actions", actions)
    for name, norm in (("state", processing.state_norm), ("action", processing.action_norm)):
        yield _line(f"{name} stats", _statistics(norm))


def _statistics(norm: Normalisation) -> str:
    names = ("mean", "std") if norm.method == "mean_std" else ("q01", "q99")
    shown = [" ".join(f"{value:.3g}" for value in values[:8]) for values in (norm.first, norm.second)]
    return f"{norm.method} as {norm.convention}, {names[0]} [{shown[0]}], {names[1]} [{shown[1]}]"
