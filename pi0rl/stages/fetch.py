"""``sft/policy``: an existing SFT checkpoint instead of demonstrations and imitation."""

from __future__ import annotations

import json
from pathlib import Path

from pi0rl.errors import UserError
from pi0rl.experiment import Experiment
from pi0rl.files import replace_directory
from pi0rl.policy.checkpoints import Layout, joint_digest, layout_of, load_policy, save_policy, weights_of
from pi0rl.policy.description import check_variant
from pi0rl.policy.precision import set_precision
from pi0rl.policy.sources import ORIGIN, Source, origin_of, print_if_moving, resolve


def run(experiment: Experiment) -> None:
    """Load it in any layout, save it as our own in ``actor.model.precision``, and record where it is from."""
    fetch = experiment.params.fetch
    if fetch is None:
        raise UserError(
            "fetch: the params name no checkpoint; set fetch.checkpoint to a folder, org/name, models:/name/version or "
            "dvc:REPOSITORY#PATH"
        )
    source = resolve(fetch.checkpoint, fetch.revision, default_branch=True)
    in_name = source.kind == "hub" and "@" in fetch.checkpoint
    print_if_moving(
        source,
        f"fetch.checkpoint: {source.location}@{source.commit}" if in_name else f"fetch.revision: {source.commit}",
    )
    layout = layout_of(source.directory)
    origin = origin_of(source, layout)
    if fetch.sha256 is not None:
        _check_digest(source, layout, origin["sha256"], fetch.sha256)
    policy = load_policy(source.directory, None if fetch.assets is None else Path(fetch.assets))
    check_variant(policy.config, experiment.params.actor.model.variant, source.location)
    if experiment.params.actor.model.precision is not None:
        set_precision(policy, experiment.params.actor.model.precision)
    with replace_directory(experiment.stage_dir("sft")) as folder:
        save_policy(policy, folder / "policy")
        (folder / "policy" / ORIGIN).write_text(json.dumps(origin, indent=1) + "\n")


def _check_digest(source: Source, layout: Layout, digests: dict[str, str], expected: str) -> None:
    """Compare the files that are loaded, all of them."""
    names = [str(file.relative_to(source.directory)) for file in weights_of(source.directory, layout)]
    got = joint_digest({name: digests[name] for name in names})
    if got != expected:
        of = names[0] if len(names) == 1 else f"the {len(names)} weight files together"
        raise UserError(
            f"fetch.sha256: {source.location}: expected {expected}, got {got} (of {of}); fetch the revision you mean, "
            "or correct the digest"
        )
