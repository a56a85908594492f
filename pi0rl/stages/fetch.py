"""``sft/policy``: an existing SFT checkpoint instead of demonstrations and imitation."""

from __future__ import annotations

import json
from pathlib import Path

from pi0rl.errors import UserError
from pi0rl.experiment import Experiment
from pi0rl.files import replace_directory
from pi0rl.policy.checkpoints import layout_of, load_policy, save_policy
from pi0rl.policy.description import check_variant
from pi0rl.policy.precision import set_precision
from pi0rl.policy.sources import ORIGIN, Source, origin_of, resolve


def run(experiment: Experiment) -> None:
    """Load it in any layout, save it as our own in ``actor.model.precision``, and record where it is from."""
    fetch = experiment.params.fetch
    if fetch is None:
        raise UserError("fetch: the params name no checkpoint; set fetch.checkpoint to a folder or a hub id")
    source = resolve(fetch.checkpoint, fetch.revision)
    origin = origin_of(source, layout_of(source.directory))
    _check_digest(source, origin["sha256"], fetch.sha256)
    policy = load_policy(source.directory, None if fetch.assets is None else Path(fetch.assets))
    check_variant(policy.config, experiment.params.actor.model.variant, source.location)
    if experiment.params.actor.model.precision is not None:
        set_precision(policy, experiment.params.actor.model.precision)
    with replace_directory(experiment.stage_dir("sft")) as folder:
        save_policy(policy, folder / "policy")
        (folder / "policy" / ORIGIN).write_text(json.dumps(origin, indent=1) + "\n")


def _check_digest(source: Source, digests: dict[str, str], expected: str | None) -> None:
    weights = {name: digest for name, digest in digests.items() if name.endswith((".safetensors", ".pt"))}
    if expected is not None and expected not in weights.values():
        got = ", ".join(f"{name} {digest}" for name, digest in weights.items())
        raise UserError(
            f"fetch.sha256: {source.location} has no weights of digest {expected}, got {got}; fetch the revision you "
            "mean, or correct the digest"
        )
