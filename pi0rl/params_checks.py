"""Params that are legal one by one, and together are impossible, train nothing or leave a key without effect.

Every check raises ValueError, which says what, why, and what to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pi0rl.params import Params


def check_together(params: Params) -> None:
    """All of the checks."""
    _check_repeated(params)
    _check_method(params)
    _check_learning(params)
    _check_effects(params)
    _check_counts(params)
    _check_ranges(params)
    _check_imitation(params)
    _check_evaluation(params)
    _check_validation(params)


def _check_repeated(params: Params) -> None:
    """RLinf states these in two sections."""
    model, openpi = params.actor.model, params.openpi
    for key, value, other, expected in (
        ("openpi.action_chunk", openpi.action_chunk, "actor.model.num_action_chunks", model.num_action_chunks),
        ("openpi.num_steps", openpi.num_steps, "actor.model.num_steps", model.num_steps),
        ("openpi.action_env_dim", openpi.action_env_dim, "actor.model.action_dim", model.action_dim),
    ):
        if value is not None and value != expected:
            raise ValueError(f"{key} is {value} but {other} is {expected}: make them equal or leave {key} out")


def _check_method(params: Params) -> None:
    model, openpi = params.actor.model, params.openpi
    if params.algorithm.adv_type == "gae" and not openpi.add_value_head:
        raise ValueError("algorithm.adv_type gae needs openpi.add_value_head: true (or use adv_type: grpo)")
    if openpi.noise_anneal and openpi.noise_method not in ("flow_sde", "flow_cps"):
        raise ValueError(
            f"openpi.noise_anneal changes the noise level, which {openpi.noise_method} does not have; "
            "set noise_anneal: false, or noise_method: flow_sde or flow_cps"
        )
    if params.actor.fsdp_config.sharding_strategy == "full_shard" and (model.is_lora or model.torch_compile):
        other = "is_lora" if model.is_lora else "torch_compile"
        raise ValueError(
            f"actor.fsdp_config.sharding_strategy full_shard does not go with actor.model.{other}; "
            "set no_shard, or leave the other out"
        )


def _check_learning(params: Params) -> None:
    """Refuse what would run for hours and leave the policy as it was.

    Without noise at a denoising step its log-prob is the constant 0, so every ratio is 1 and no guard says a word.
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


def _check_effects(params: Params) -> None:
    """Refuse keys that another key leaves without effect."""
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


def _check_counts(params: Params) -> None:
    train, evaluated, algorithm = params.env.train, params.env.eval, params.algorithm
    episodes = train.total_num_envs * algorithm.rollout_epoch
    if episodes % algorithm.group_size:
        raise ValueError(
            f"algorithm.group_size {algorithm.group_size} does not divide the {episodes} episodes of an "
            "iteration (env.train.total_num_envs x algorithm.rollout_epoch)"
        )
    stages = params.rollout.pipeline_stage_num
    for where, env in (("env.train", train), ("env.eval", evaluated)):
        if env.total_num_envs % (env.workers * stages):
            raise ValueError(
                f"{where}.total_num_envs {env.total_num_envs} does not divide into {where}.workers {env.workers} x "
                f"rollout.pipeline_stage_num {stages}"
            )


def _check_ranges(params: Params) -> None:
    for where, (first, end) in (
        ("demos.init_state_ids", params.demos.init_state_ids),
        ("env.train.init_state_ids", params.env.train.init_state_ids),
    ):
        if first >= end:
            raise ValueError(f"{where} is [{first}, {end}]: expected first (included) below last (excluded)")


def _check_imitation(params: Params) -> None:
    sft = params.sft
    if sft.gradient_accumulation > sft.batch_size:
        raise ValueError(
            f"sft.gradient_accumulation {sft.gradient_accumulation} parts of sft.batch_size {sft.batch_size}: expected "
            "at most one part per sample"
        )
    if params.fetch is None and sft.checkpoint is None and (sft.train_expert_only or sft.lora_rank is not None):
        raise ValueError(
            "sft.train_expert_only and sft.lora_rank leave the weights of sft.checkpoint as they are, and none is "
            "named: without it training begins at random weights, all of which have to be trained"
        )
    if sft.target_success is not None and sft.val_check_start > sft.steps:
        raise ValueError(f"sft.val_check_start {sft.val_check_start} is beyond sft.steps {sft.steps}")


def _check_evaluation(params: Params) -> None:
    if forgotten := [suite for suite in params.suites if suite not in params.evaluated_suites]:
        raise ValueError(
            f"evaluation.suites leaves out {forgotten[0]}, which suites trains on: name it as well, or leave "
            "evaluation.suites out to judge on what is trained"
        )


def _check_validation(params: Params) -> None:
    runner = params.runner
    interval = runner.val_check_interval
    if interval < -1 or interval == 0:
        raise ValueError(f"runner.val_check_interval is {interval}: expected a number of iterations, or -1 for never")
    if interval > 0 and runner.save_interval % interval:
        raise ValueError(
            f"runner.save_interval {runner.save_interval} is no multiple of runner.val_check_interval {interval}: "
            "every checkpoint is to be validated"
        )
    if interval < 0 and runner.final_policy == "best":
        raise ValueError(
            "runner.final_policy best needs runner.val_check_interval: the best of noisy training episodes is the "
            "luckiest; set an interval, or final_policy: last"
        )
