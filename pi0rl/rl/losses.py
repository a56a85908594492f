"""PPO's losses on flow policies.

Log-probs are [N, S, C, E]: N samples (chunks), S stochastic denoising steps, C actions of E numbers; every
(sample, denoising step) has its own ratio and the S terms are averaged. Sources: Schulman et al. 2017 (PPO), Ye et al.
2020 (dual clip), Yu et al. 2025 (asymmetric clip), Schulman 2020 (KL estimators); aggregation as in RLinf.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pi0rl.rl.config import AlgorithmConfig, Level

Metrics = dict[str, Tensor]


def sum_to_level(log_probs: Tensor, level: Level) -> Tensor:
    """Sum [..., C, E] over what ``level`` treats as one event, keeping the axes: chunk [..., 1, 1], action
    [..., C, 1], token unchanged."""
    if level == "chunk_level":
        return log_probs.sum(dim=(-2, -1), keepdim=True)
    return log_probs.sum(dim=-1, keepdim=True) if level == "action_level" else log_probs


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """``sum(x mask) / sum(mask)``, 0 where nothing counts. The denominator counts the mask's own elements: an axis
    along which the mask is broadcast is summed, not averaged (as RLinf does at token level)."""
    total = (x * mask).sum()
    return total / mask.sum().clamp(min=1)


def aggregate(x: Tensor, mask: Tensor, weights: Tensor | None) -> Tensor:
    """:func:`masked_mean`, or with weights the mean of ``x mask weight`` over all entries, masked-out ones included."""
    return masked_mean(x, mask) if weights is None else (x * mask * weights).mean()


def huber(error: Tensor, delta: float) -> Tensor:
    """``e^2 / 2`` for |e| < delta, else ``delta (|e| - delta / 2)``."""
    size = error.abs()
    return torch.where(size < delta, 0.5 * error**2, delta * (size - 0.5 * delta))


def kl_estimate(log_probs: Tensor, reference: Tensor, kind: str) -> Tensor:
    """Pointwise estimate of KL(policy || reference) from samples of the policy, with d = log p - log q:
    ``kl`` d; ``abs`` |d|; ``mse`` d^2 / 2; ``low_var_kl`` ``exp(-d) - 1 + d`` (never negative; -d and the result are
    clamped to [-20, 20] and [-10, 10])."""
    difference = log_probs - reference
    if kind == "kl":
        return difference
    if kind == "abs":
        return difference.abs()
    if kind == "mse":
        return 0.5 * difference**2
    inverse = (-difference).clamp(-20.0, 20.0)
    return (inverse.exp() - inverse - 1.0).clamp(-10.0, 10.0)


def gaussian_kl(mean: Tensor, std: Tensor, ref_mean: Tensor, ref_std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(ref_mean, ref_std^2)) of every number; 0 where nothing is random (std 0)."""
    fixed = (std == 0) | (ref_std == 0)
    std, ref_std = (torch.where(fixed, torch.ones_like(x), x) for x in (std, ref_std))
    kl = (ref_std / std).log() + (std**2 + (mean - ref_mean) ** 2) / (2 * ref_std**2) - 0.5
    return torch.where(fixed, 0.0, kl)


def actor_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    config: AlgorithmConfig,
    weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Clipped policy loss: per ratio rho ``max(-A rho, -A clip(rho, 1 - low, 1 + high))``, then, with dual clip,
    at most ``c |A|``.

    Args:
        log_probs: [N, S, C, E], with gradient.
        old_log_probs: [N, S, C, E].
        advantages: [N, L], L = 1 or C.
        mask: bool [N, L].
        weights: [N, L] or None, see :func:`aggregate`.

    Returns:
        The loss and its metrics. Three estimate the KL from the old policy (Schulman 2020): ``actor/approx_kl``
        -log rho, ``actor/approx_kl_k2`` ``(log rho)^2 / 2``, ``actor/approx_kl_k3`` ``rho - 1 - log rho``, each summed
        over the ratios of what has an advantage (a chunk, or at L = C an action), and averaged over these and over
        denoising steps.
    """
    log_ratio = sum_to_level(log_probs, config.logprob_type) - sum_to_level(old_log_probs, config.logprob_type)
    if config.clip_log_ratio_min is not None or config.clip_log_ratio_max is not None:
        log_ratio = log_ratio.clamp(config.clip_log_ratio_min, config.clip_log_ratio_max)
    advantage, valid = advantages[:, None, :, None], mask[:, None, :, None]
    log_ratio = torch.where(valid, log_ratio, 0.0)
    ratio = torch.where(valid, log_ratio.exp(), 0.0)
    clipped_ratio = ratio.clamp(1.0 - config.clip_ratio_low, 1.0 + config.clip_ratio_high)
    plain, clipped = -advantage * ratio, -advantage * clipped_ratio
    loss = torch.maximum(plain, clipped)
    dual_clipped = torch.zeros_like(loss, dtype=torch.bool)
    if config.clip_ratio_c is not None:
        bound = config.clip_ratio_c * advantage.abs()
        dual_clipped = (bound < loss) & valid
        loss = torch.minimum(loss, bound)

    weight = None if weights is None else weights[:, :, None]
    total = aggregate(loss.mean(dim=1), mask[:, :, None], weight)
    with torch.no_grad():
        counted = valid.expand_as(log_ratio)
        entries = mask.sum().clamp(min=1) * log_probs.shape[1]
        metrics = {
            "actor/policy_loss": total.detach(),
            "actor/policy_loss_abs": aggregate(loss.abs().mean(dim=1), mask[:, :, None], weight),
            "actor/ratio": masked_mean(ratio, counted),
            "actor/ratio_abs": masked_mean((ratio - 1.0).abs(), counted),
            "actor/clipped_ratio": masked_mean(clipped_ratio, counted),
            "actor/dual_clipped_ratio": masked_mean(ratio * dual_clipped, counted),
            "actor/approx_kl": -log_ratio.sum() / entries,
            "actor/approx_kl_k2": 0.5 * (log_ratio**2).sum() / entries,
            "actor/approx_kl_k3": torch.where(valid, ratio - 1.0 - log_ratio, 0.0).sum() / entries,
            "actor/pg_clipfrac": masked_mean((plain < clipped).float(), counted),
            "actor/dual_clipfrac": masked_mean(dual_clipped.float(), counted),
        }
    return total, metrics


def critic_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    config: AlgorithmConfig,
    weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Clipped value loss: ``max(huber(R - v), huber(R - v_clip))`` with
    ``v_clip = v_old + clamp(v - v_old, -value_clip, value_clip)``; all arguments [N, L]."""
    loss = huber(returns - values, config.huber_delta)
    clipped_fraction = torch.zeros(())
    if config.value_clip is not None:
        change = values - old_values
        clipped_values = old_values + change.clamp(-config.value_clip, config.value_clip)
        loss = torch.maximum(loss, huber(returns - clipped_values, config.huber_delta))
        clipped_fraction = masked_mean((change.detach().abs() > config.value_clip).float(), mask)
    total = aggregate(loss, mask, weights)
    return total, {"actor/value_loss": total.detach(), "actor/value_clip_ratio": clipped_fraction}


def explained_variance_moments(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """float64 [5]: count, sum and sum of squares of the returns, and of ``returns - values``, over the valid entries.
    Moments of parts of an update add up; see :func:`explained_variance`."""
    targets = returns[mask].double()
    errors = targets - values.detach()[mask].double()
    count = torch.full_like(targets.sum(), targets.numel())
    return torch.stack([count, targets.sum(), (targets**2).sum(), errors.sum(), (errors**2).sum()])


def explained_variance(moments: Iterable[Tensor]) -> float:
    """``1 - Var(R - v) / Var(R)`` from the moments of all parts; NaN if the returns do not vary."""
    count, target_sum, target_squares, error_sum, error_squares = torch.stack(list(moments)).sum(dim=0).tolist()
    if count == 0:
        return float("nan")
    target_variance = target_squares / count - (target_sum / count) ** 2
    error_variance = error_squares / count - (error_sum / count) ** 2
    return 1.0 - error_variance / target_variance if target_variance > 0.0 else float("nan")
