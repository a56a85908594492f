"""One iteration's update: epochs over shuffled minibatches, with guards.

Nothing here knows the policy: ``evaluate`` recomputes log-probs, values and entropy of the samples it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pi0rl.errors import UserError
from pi0rl.rl import losses
from pi0rl.rl.advantages import Batch
from pi0rl.rl.config import AlgorithmConfig, UpdateConfig, effective, watched_kl
from pi0rl.rl.optimizer import GradientNorms, PolicyOptimizer
from pi0rl.rl.schedules import adam_warmup_factor, learning_rate_factor


@dataclass(frozen=True)
class Evaluation:
    """What the policy makes of n samples, with gradient.

    Attributes:
        log_probs: [n, S, C, E].
        values: [n]; None without critic.
        entropy: [n], mean per number; None where the noise is not learned.
        mean, std: [n, S', C, E], transitions at the stochastic denoising steps; needed for ``kl_penalty="gaussian"``.
    """

    log_probs: Tensor
    values: Tensor | None
    entropy: Tensor | None
    mean: Tensor | None = None
    std: Tensor | None = None


# What :func:`pi0rl.rl.losses.critic_loss` reports.
CRITIC_METRICS = ("actor/value_loss", "actor/value_clip_ratio")

Evaluate = Callable[[Tensor], Evaluation]
"""Samples int64 [n] -> what the policy makes of them."""


class Team(Protocol):
    """Several processes that make one update: each computes every ``size``-th micro batch, from its ``rank`` on.

    ``in_step``: none can compute without the others, so where some have a micro batch less they compute one in vain.
    """

    rank: int
    size: int
    in_step: bool

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Put the sum over the team into every gradient; None where nobody has one."""
        ...

    def gather(self, shares: Sequence[Any]) -> list[Any]:
        """What all have computed, in the order of the micro batches."""
        ...


class Alone:
    """A team of one."""

    rank, size, in_step = 0, 1, False

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Nobody else has any."""

    def gather(self, shares: Sequence[Any]) -> list[Any]:
        return list(shares)


@dataclass(frozen=True)
class Step:
    """One optimiser step.

    Attributes:
        norms: of the gradients before clipping.
        actor_lr, value_lr: the two rates; the actor's is 0 where it was left as it is.
        critic_only: whether it was.
    """

    norms: GradientNorms
    actor_lr: float
    value_lr: float
    critic_only: bool

    @property
    def taken(self) -> bool:
        """Not where a norm is not finite."""
        return self.norms.finite


@dataclass(frozen=True)
class UpdateReport:
    """Attributes:
    metrics: means over the update, names as logged.
    steps: in order; without a critic a minibatch that ``target_kl`` stopped has none.
    stopped_by_kl: whether ``target_kl`` ended the actor's part of the update early.
    """

    metrics: dict[str, float]
    steps: tuple[Step, ...]
    stopped_by_kl: bool


@dataclass
class _Tally:
    """What the micro batches of an update add up to."""

    metrics: list[tuple[float, losses.Metrics]] = field(default_factory=list)
    moments: list[Tensor] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def add(self, parts: Sequence[_Part], stopped: bool) -> None:
        """``stopped``: the actor does not learn from them any more, so that only the critic's metrics count."""
        for share, metrics, _ in parts:
            counted = {name: metrics[name] for name in CRITIC_METRICS} if stopped else metrics
            self.metrics.append((share, counted))
        self.moments += [moments for _, _, moments in parts if moments is not None]


_Part = tuple[float, losses.Metrics, Tensor | None]
"""Of a micro batch: its share of the minibatch, its metrics, and the critic's moments if there is a critic."""


def update(
    evaluate: Evaluate,
    batch: Batch,
    optimizer: PolicyOptimizer,
    config: UpdateConfig,
    iteration: int,
    lr_factor: float = 1.0,
    team: Team | None = None,
) -> UpdateReport:
    """Train on ``batch`` for ``update_epoch`` epochs, the actor until ``target_kl`` stops it, the critic to their end.

    Deterministic given the parameters, the optimiser's state, ``config.seed`` and ``iteration``.

    Args:
        iteration: RL iteration, 0, 1, ...; decides shuffles and schedules.
        lr_factor: on both learning rates, besides the schedules (see :mod:`pi0rl.rl.guards`).
        team: who shares the work; all must call with the same arguments, and all take the same steps.

    Raises:
        UserError: a ratio of the first minibatch is not 1 within ``ratio_tolerance``, or (``compat="rlinf"``) the
            samples do not divide into minibatches.
    """
    settings, watched = effective(config.algorithm), watched_kl(config.algorithm)
    tally, team = _Tally(), team or Alone()
    first_ratio_error, max_kl, stopped = 0.0, 0.0, False
    for minibatch in minibatches(len(batch), config, iteration):
        critic_only = stopped or _critic_only(optimizer, config)
        done = len(tally.metrics)
        parts = micro_batches(minibatch, config)
        own = list(parts[team.rank :: team.size])
        shares = [len(rows) / len(minibatch) for rows in own]
        if team.in_step and len(own) < -(-len(parts) // team.size):
            own, shares = [*own, parts[0]], [*shares, 0.0]
        tally.add(team.gather(_accumulate_gradients(evaluate, batch, own, shares, settings, critic_only)), stopped)
        fresh = tally.metrics[done:]
        if done == 0:
            first_ratio_error = max(float(metrics["max_log_ratio"]) for _, metrics in fresh)
            _check_first_ratio(first_ratio_error, settings)
        if not stopped:
            kl = sum(share * float(metrics[watched]) for share, metrics in fresh)
            max_kl = max(max_kl, kl)
            stopped = settings.target_kl is not None and not critic_only and kl > settings.target_kl
        if stopped and not optimizer.critic:
            optimizer.zero_grad()
            break
        team.sum_gradients([*optimizer.actor.values(), *optimizer.critic.values()])
        tally.steps.append(_optimizer_step(optimizer, config, iteration, critic_only or stopped, lr_factor))
    optimizer.updates += 1
    return UpdateReport(_summary(tally, first_ratio_error, max_kl, stopped), tuple(tally.steps), stopped)


def minibatches(samples: int, config: UpdateConfig, iteration: int) -> list[Tensor]:
    """Shuffled row numbers per optimiser step, all epochs. Minibatches of an epoch differ by at most one row."""
    if samples == 0:
        return []
    epochs = config.algorithm.update_epoch
    if config.algorithm.compat == "rlinf":
        if samples % config.global_batch_size:
            raise UserError(
                f"actor.global_batch_size={config.global_batch_size}: must divide the {samples} samples of an "
                "iteration with algorithm.compat=rlinf; choose a divisor"
            )
        generator = torch.Generator().manual_seed(config.seed)
        once = torch.randperm(samples, generator=generator).split(config.global_batch_size)
        return [rows for _ in range(epochs) for rows in once]
    count = max(1, round(samples / config.global_batch_size))
    minibatches = []
    for epoch in range(epochs):
        order = np.random.default_rng([config.seed, iteration, epoch]).permutation(samples)
        minibatches += [torch.from_numpy(rows) for rows in np.array_split(order, count)]
    return minibatches


def micro_batches(minibatch: Tensor, config: UpdateConfig) -> Sequence[Tensor]:
    """As few parts of ``micro_batch_size`` rows at most as there can be, which differ by at most one row: a part of a
    few rows costs nearly as much as a whole one. RLinf fills all but the last."""
    size = config.micro_batch_size
    if config.algorithm.compat == "rlinf":
        return minibatch.split(size)
    return minibatch.tensor_split(-(-len(minibatch) // size))


def _critic_only(optimizer: PolicyOptimizer, config: UpdateConfig) -> bool:
    optim = config.optim
    return bool(optimizer.critic) and (
        optimizer.updates < optim.critic_warmup_iterations or optimizer.steps < optim.critic_warmup_steps
    )


def _accumulate_gradients(
    evaluate: Evaluate,
    batch: Batch,
    parts: Sequence[Tensor],
    shares: Sequence[float],
    settings: AlgorithmConfig,
    critic_only: bool,
) -> list[_Part]:
    """Backward pass over micro batches, each weighted by its share of the minibatch's rows; those with none have no
    part in the result."""
    done: list[_Part] = []
    for rows, share in zip(parts, shares, strict=True):
        part = batch.rows(rows.to(batch.samples.device))
        result = evaluate(part.samples)
        loss, metrics = _loss(part, result, settings, critic_only)
        (share * loss).backward()
        if share == 0.0:
            continue
        moments = None
        if result.values is not None and part.returns is not None:
            moments = losses.explained_variance_moments(result.values[:, None], part.returns, part.mask)
        done.append((share, metrics, moments))
    return done


def _loss(part: Batch, new: Evaluation, settings: AlgorithmConfig, critic_only: bool) -> tuple[Tensor, losses.Metrics]:
    """``actor + critic - entropy_bonus * entropy + kl_beta * KL``; the critic's part alone during its warm-up."""
    total, metrics = losses.actor_loss(
        new.log_probs, part.log_probs, part.advantages, part.mask, settings, part.weights
    )
    with torch.no_grad():
        log_ratio = losses.sum_to_level(new.log_probs - part.log_probs, "chunk_level")
        valid = part.mask.any(dim=1)
        metrics["max_log_ratio"] = (log_ratio.abs() * valid[:, None, None, None]).max()
    if new.entropy is not None:
        entropy = losses.masked_mean(new.entropy[:, None], part.mask)
        metrics["actor/entropy"] = entropy.detach()
        total = total - settings.entropy_bonus * _numbers_per_event(new.log_probs, settings) * entropy
    if settings.kl_beta > 0.0:
        kl = _reference_kl(part, new, settings)
        metrics["actor/ref_kl"] = kl.detach()
        total = total + settings.kl_beta * kl
    if critic_only:
        total = torch.zeros_like(total)
        metrics["actor/policy_loss"] = total
    if settings.loss_type == "actor_critic":
        if new.values is None or part.values is None or part.returns is None:
            raise ValueError("algorithm.loss_type=actor_critic needs values from the policy and in the batch")
        value_loss, value_metrics = losses.critic_loss(
            new.values[:, None], part.values, part.returns, part.mask, settings, part.weights
        )
        metrics |= value_metrics
        total = total + value_loss
    metrics["actor/loss"] = total.detach()
    return total, metrics


def _numbers_per_event(log_probs: Tensor, settings: AlgorithmConfig) -> int:
    """Entropy is reported per number; independent numbers add up within an event of ``entropy_type``."""
    chunk, dims = log_probs.shape[-2:]
    return {"token_level": 1, "action_level": dims, "chunk_level": chunk * dims}[settings.entropy_type]


def _reference_kl(part: Batch, new: Evaluation, settings: AlgorithmConfig) -> Tensor:
    """KL to the reference policy, aggregated like the actor's loss."""
    reference = part.reference
    if reference is None or new.mean is None or new.std is None:
        raise ValueError("algorithm.kl_beta > 0 needs the reference policy in the batch and the policy's transitions")
    if settings.kl_penalty == "gaussian":
        kl = losses.gaussian_kl(new.mean, new.std, reference.mean, reference.std)
        kl = losses.sum_to_level(kl, settings.logprob_type)
    else:
        log_probs = losses.sum_to_level(new.log_probs, settings.logprob_type)
        reference_log_probs = losses.sum_to_level(reference.log_probs, settings.logprob_type)
        kl = losses.kl_estimate(log_probs, reference_log_probs, settings.kl_penalty)
    weight = None if part.weights is None else part.weights[:, :, None]
    return losses.aggregate(kl.mean(dim=1), part.mask[:, :, None], weight)


def _check_first_ratio(error: float, settings: AlgorithmConfig) -> None:
    tolerance = settings.ratio_tolerance
    if tolerance is not None and not error <= tolerance:
        raise UserError(
            f"first minibatch: |log ratio| reaches {error:.3g} before any optimiser step, expected at most "
            f"algorithm.ratio_tolerance={tolerance:g}; the update does not recompute what the rollout sampled: check "
            "that both use the same weights, precision and inputs"
        )


def _optimizer_step(
    optimizer: PolicyOptimizer, config: UpdateConfig, iteration: int, critic_only: bool, lr_factor: float
) -> Step:
    compat = config.algorithm.compat == "rlinf"
    factor = lr_factor * learning_rate_factor(config.optim, iteration, compat)
    actor_lr = config.optim.lr * factor * adam_warmup_factor(config.optim, optimizer.actor_steps)
    value_lr = config.optim.value_lr * factor
    norms = optimizer.step(actor_lr, value_lr, critic_only, clip_jointly=compat)
    if compat and critic_only and not _critic_only(optimizer, config):
        optimizer.forget()
    return Step(norms, 0.0 if critic_only else actor_lr, value_lr, critic_only)


def _summary(tally: _Tally, first_ratio_error: float, max_kl: float, stopped: bool) -> dict[str, float]:
    """Means over micro batches (by share of their minibatch) and over optimiser steps; nothing of nothing."""
    summary: dict[str, float] = {}
    for name in tally.metrics[0][1] if tally.metrics else ():
        if "/" in name:
            parts = [(share, float(metrics[name])) for share, metrics in tally.metrics if name in metrics]
            summary[name] = sum(share * value for share, value in parts) / sum(share for share, _ in parts)
    taken = [step for step in tally.steps if step.taken]
    of_actor = [(step.norms.actor, step.actor_lr) for step in taken if step.norms.actor is not None]
    summary |= {
        **_mean("actor/grad_norm", [norm for norm, _ in of_actor]),
        **_mean("actor/lr", [rate for _, rate in of_actor]),
        "actor/optimizer_steps": float(sum(not step.critic_only for step in taken)),
        "actor/skipped_steps": float(len(tally.steps) - len(taken)),
        "actor/stopped_by_kl": float(stopped),
    }
    if tally.metrics:
        summary |= {"actor/max_kl": max_kl, "actor/first_ratio_error": first_ratio_error}
    if tally.moments:
        summary |= {
            **_mean("critic/grad_norm", [step.norms.critic for step in taken if step.norms.critic is not None]),
            **_mean("critic/lr", [step.value_lr for step in taken]),
            "critic/optimizer_steps": float(len(taken)),
            "critic/explained_variance": losses.explained_variance(tally.moments),
        }
    return summary


def _mean(name: str, numbers: Sequence[float]) -> dict[str, float]:
    """Nothing of nothing."""
    return {name: sum(numbers) / len(numbers)} if numbers else {}
