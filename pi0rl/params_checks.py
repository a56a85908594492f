"""Params that are legal one by one, and together train nothing or leave a key without effect."""

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


def check_effects(params: Params) -> None:
    """Refuse keys that another key leaves without effect.

    Raises:
        ValueError: says which, and which to leave out.
    """
    openpi = params.openpi
    if openpi.joint_logprob and openpi.stochastic_steps != "one":
        raise ValueError(
            f"openpi.joint_logprob makes every denoising step stochastic, stochastic_steps {openpi.stochastic_steps} "
            "would have no effect; set stochastic_steps: one, the default, or joint_logprob: false"
        )
    if openpi.ignore_last and (openpi.joint_logprob or openpi.stochastic_steps != "one"):
        raise ValueError(
            "openpi.ignore_last keeps the last denoising step from being drawn, and none is drawn with joint_logprob "
            f"or stochastic_steps {openpi.stochastic_steps}; set ignore_last: false, or stochastic_steps: one"
        )
    if openpi.chunk_critic_input and openpi.value_after_vlm:
        raise ValueError(
            "openpi.chunk_critic_input chooses among the action expert's tokens, and with value_after_vlm the critic "
            "reads the VLM's; set one of them to false"
        )
    if params.algorithm.entropy_bonus > 0.0 and openpi.noise_method not in ("flow_noise", "reinflow"):
        raise ValueError(
            f"algorithm.entropy_bonus rewards noise that is learned, and {openpi.noise_method}'s is given; set "
            "entropy_bonus: 0, or openpi.noise_method: flow_noise"
        )
