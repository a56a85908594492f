"""Params that are legal one by one and together train nothing, or ask for what cannot be."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pi0rl.params import Params


def check_learning(params: Params) -> None:
    """Refuse what would run for hours and leave the policy as it was.

    Without noise at a denoising step its log-prob is the constant 0, so every ratio is 1 and no guard says a word.

    Raises:
        ValueError: says what, why, and what to do.
    """
    openpi, algorithm = params.openpi, params.algorithm
    method = openpi.noise_method
    if method == "flow_ode":
        raise ValueError(
            "openpi.noise_method flow_ode draws no noise, so that every ratio is 1 and nothing is learned; set "
            "flow_sde, flow_cps or flow_noise (evaluations have no noise whatever is set)"
        )
    single = openpi.stochastic_steps == "last" and not openpi.joint_logprob
    if method == "flow_cps" and (single or params.actor.model.num_steps == 1):
        raise ValueError(
            "openpi.noise_method flow_cps has no noise at the last denoising step, so that every ratio is 1 and "
            "nothing is learned; set openpi.stochastic_steps: one and actor.model.num_steps above 1, or "
            "noise_method: flow_sde"
        )
    level = min(openpi.noise_params[:2]) if openpi.noise_anneal else openpi.noise_level
    if method in ("flow_sde", "flow_cps") and level == 0.0:
        key = "noise_params" if openpi.noise_anneal else "noise_level"
        raise ValueError(f"openpi.{key} is 0: without noise every ratio is 1 and nothing is learned; set it above 0")
    if algorithm.filter_rewards and algorithm.group_size == 1:
        raise ValueError(
            "algorithm.filter_rewards compares the episodes of a group, and algorithm.group_size is 1: all successes "
            "or all failures would be left out; set filter_rewards: false or group_size above 1"
        )
