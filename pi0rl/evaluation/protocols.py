"""Evaluation protocols: the same name of a benchmark stands for different exams, so each is an object with a hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

from pi0rl.errors import UserError
from pi0rl.libero.suites import suite_tasks
from pi0rl.params import Params


@dataclass(frozen=True)
class SuiteRule:
    """What a protocol says about one suite, and about LIBERO-PRO's perturbations of it.

    Attributes:
        suite: one of LIBERO's five.
        max_steps: control steps per episode, settling not counted.
        replan_steps: actions executed between two looks of the policy, of the horizon it predicts.
    """

    suite: str
    max_steps: int
    replan_steps: int


@dataclass(frozen=True)
class Protocol:
    """How a policy is examined. Two results may be compared if their protocols have the same hash.

    Attributes:
        name: what to call it; not part of the hash.
        rules: per suite.
        episodes_per_task: init states 0 .. episodes_per_task - 1 of every task, each once.
        settle_steps: no-op steps (gripper opening) after a reset, before the policy sees anything.
        denoising_steps: integration steps from noise to actions; deterministic given the noise.
        camera_size: pixels of both square images as rendered; the checkpoint's processing resizes them.
        render_profile: ``reference`` is pixel-identical to LIBERO's own renderer.
        after_success: ``stop`` ends an episode at its first success, so success at the end is success at any step;
            ``continue`` plays on to the limit, where an object may be dropped again.
        scene_seed: places the fixtures, which an init state does not hold.
        scene_seeds: ``one`` for all episodes of a task, or one more ``per_episode`` (scene_seed + init state).
        instructions: the task's ``own``, or ``permuted``: that of another task of the suite, drawn from scene_seed and
            init state, while success is judged by the task's own goal. What then still succeeds did not need words.
    """

    name: str
    rules: tuple[SuiteRule, ...]
    episodes_per_task: int
    settle_steps: int
    denoising_steps: int
    camera_size: int
    render_profile: Literal["reference", "fast"]
    after_success: Literal["stop", "continue"]
    scene_seed: int
    scene_seeds: Literal["one", "per_episode"]
    instructions: Literal["own", "permuted"] = "own"

    @property
    def hash(self) -> str:
        """12 hex digits that name everything but the name."""
        values = {key: value for key, value in asdict(self).items() if key != "name"}
        if self.instructions == "own":
            del values["instructions"]  # younger than the hashes that are published
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]

    def rule(self, suite: str) -> SuiteRule:
        """The rule for a suite or a perturbation of it.

        Raises:
            UserError: the suite is unknown.
        """
        suite_tasks(suite)  # refuses an unknown name and says which are known
        return max((rule for rule in self.rules if suite.startswith(rule.suite)), key=lambda rule: len(rule.suite))


def _rules(limits: Sequence[int], replan_steps: int, replan_steps_long: int | None = None) -> tuple[SuiteRule, ...]:
    long = replan_steps_long or replan_steps
    suites = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
    replan = (replan_steps, replan_steps, replan_steps, long, replan_steps)
    return tuple(map(SuiteRule, suites, limits, replan))


# openpi seeds once per task and draws the fixtures anew in every episode; here all episodes have its first draw.
OPENPI = Protocol(
    name="openpi",
    rules=_rules((220, 280, 300, 520, 400), replan_steps=5),
    episodes_per_task=50,
    settle_steps=10,
    denoising_steps=10,
    camera_size=256,
    render_profile="reference",
    after_success="stop",
    scene_seed=7,
    scene_seeds="one",
)
LEROBOT = replace(
    OPENPI,
    name="lerobot",
    rules=_rules((280, 280, 300, 520, 400), replan_steps=10),
    episodes_per_task=10,
    scene_seed=1000,
    scene_seeds="per_episode",
)
RLINF = replace(
    OPENPI,
    name="rlinf",
    rules=_rules((240, 280, 320, 520, 400), replan_steps=5, replan_steps_long=10),
    settle_steps=15,
    denoising_steps=4,
    after_success="continue",
    scene_seed=0,
)
# openpi's exam in the scenes that training uses.
DEFAULT = replace(OPENPI, name="default", scene_seed=0)
PROTOCOLS: tuple[Protocol, ...] = (DEFAULT, OPENPI, LEROBOT, RLINF)


def protocol_named(name: str, overrides: Sequence[str] = ()) -> Protocol:
    """A preset with ``key=value`` changes, which its name then mentions.

    Args:
        name: of one of PROTOCOLS.
        overrides: a field of Protocol, or ``replan_steps`` or ``max_steps`` for all suites.

    Raises:
        UserError: an unknown name or key, or a value that is none.
    """
    known = {protocol.name: protocol for protocol in PROTOCOLS}
    if name not in known:
        raise UserError(f"--protocol {name}: unknown, expected {', '.join(known)}")
    protocol = known[name]
    for override in overrides:
        key, _, value = override.partition("=")
        protocol = _changed(protocol, key, value)
    return replace(protocol, name=f"{name} with {', '.join(overrides)}") if overrides else protocol


_CHOICES = {
    "render_profile": ("reference", "fast"),
    "after_success": ("stop", "continue"),
    "scene_seeds": ("one", "per_episode"),
    "instructions": ("own", "permuted"),
}
_PER_SUITE = ("max_steps", "replan_steps")


def _changed(protocol: Protocol, key: str, value: str) -> Protocol:
    if key in _CHOICES:
        if value not in _CHOICES[key]:
            raise UserError(f"--set {key}={value}: expected {' or '.join(_CHOICES[key])}")
        return replace(protocol, **{key: value})
    numbers = [field.name for field in fields(Protocol) if field.type == "int"]
    if key not in numbers and key not in _PER_SUITE:
        raise UserError(
            f"--set {key}: no such key of a protocol, expected {', '.join((*numbers, *_PER_SUITE, *_CHOICES))}"
        )
    if not value.isdigit() or (int(value) == 0 and key not in ("settle_steps", "scene_seed")):
        raise UserError(f"--set {key}={value}: expected a positive whole number")
    if key in _PER_SUITE:
        return replace(protocol, rules=tuple(replace(rule, **{key: int(value)}) for rule in protocol.rules))
    return replace(protocol, **{key: int(value)})


def experiment_protocol(params: Params) -> Protocol:
    """The default protocol with what an experiment's params say of cameras, chunks and denoising."""
    env, model = params.env, params.actor.model
    return replace(
        DEFAULT,
        name="experiment",
        rules=tuple(replace(rule, replan_steps=model.num_action_chunks) for rule in DEFAULT.rules),
        episodes_per_task=params.evaluation.episodes_per_task,
        settle_steps=env.settle_steps,
        denoising_steps=model.num_steps,
        camera_size=env.camera_size,
        render_profile=env.render_profile,
        scene_seed=env.seed,
    )
