"""From validated params to the settings of the cluster's components."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pi0rl.cluster.iterations import LoopConfig
from pi0rl.cluster.players import PlayersConfig
from pi0rl.errors import UserError
from pi0rl.libero.plan import Episode
from pi0rl.libero.slots import SlotConfig
from pi0rl.libero.suites import held_out_init_states, suite_tasks
from pi0rl.params import EnvEvalParams, EnvTrainParams, Params
from pi0rl.policy.critic import CriticConfig, NoiseHeadConfig
from pi0rl.policy.lora import LoraConfig
from pi0rl.policy.sampling import SamplerConfig
from pi0rl.rl.config import RewardConfig, UpdateConfig

# The tiny policy's features are 128 wide; RLinf's (512, 256, 128) is made for 1024.
TINY_CRITIC = (128, 64)

_STOCHASTIC: dict[str, Literal["single", "last", "all"]] = {"one": "single", "last": "last", "all": "all"}


def critic_config(params: Params) -> CriticConfig | None:
    """The value head that ``openpi`` asks for."""
    openpi = params.openpi
    if not openpi.add_value_head:
        return None
    tiny = params.actor.model.variant == "tiny"
    pi05 = params.actor.model.variant == "pi05"
    compat = _compat(params)
    return CriticConfig(
        source="prefix" if openpi.value_after_vlm else "expert",
        hidden=TINY_CRITIC if tiny else (1024, 512, 256) if pi05 else (512, 256, 128),
        detach=openpi.detach_critic_input,
        chunk_only=openpi.chunk_critic_input,
        matches_rollout=not compat,
        pooling=openpi.value_vlm_mode or ("mean_token" if compat else "mean_valid"),
        append_state=openpi.value_after_vlm and not compat,
        append_time=openpi.value_sees_time and not compat,
    )


def _compat(params: Params) -> bool:
    return params.algorithm.compat == "rlinf"


def noise_config(params: Params) -> NoiseHeadConfig | None:
    """The noise head of ``flow_noise``."""
    return NoiseHeadConfig(params.openpi.noise_logvar_range) if _method(params) == "flow_noise" else None


def sampler_config(params: Params) -> SamplerConfig:
    """How actions are drawn."""
    model, openpi = params.actor.model, params.openpi
    return SamplerConfig(
        method=_method(params),
        num_steps=model.num_steps,
        action_chunk=model.num_action_chunks,
        env_action_dim=model.action_dim,
        noise_level=openpi.noise_level,
        anneal=openpi.noise_params if openpi.noise_anneal else None,
        stochastic="joint" if openpi.joint_logprob else _STOCHASTIC[openpi.stochastic_steps],
        ignore_last=openpi.ignore_last,
        squared_error_log_prob=openpi.safe_get_logprob,
        step_shared_by=params.env.train.total_num_envs if _compat(params) else 1,
    )


def lora_config(params: Params) -> LoraConfig | None:
    """Adapters on the VLM."""
    model = params.actor.model
    return LoraConfig(model.lora_rank, params.seed) if model.is_lora else None


def _method(params: Params) -> Literal["flow_ode", "flow_sde", "flow_cps", "flow_noise"]:
    method = params.openpi.noise_method
    return "flow_noise" if method == "reinflow" else method


def players_config(params: Params, env: EnvTrainParams | EnvEvalParams) -> PlayersConfig:
    """The players of training (its own step limit) or of evaluation (each suite's)."""
    training = isinstance(env, EnvTrainParams)
    limit, lora = (env.max_episode_steps, lora_config(params)) if training else (None, None)
    slot = SlotConfig(
        camera_size=params.env.camera_size,
        render_profile=params.env.render_profile,
        settle_steps=params.env.settle_steps,
        max_episode_steps=limit,
        after_success="continue" if training and _compat(params) else "stop",
    )
    stages = params.rollout.pipeline_stage_num
    compiled = params.actor.model.torch_compile
    return PlayersConfig(slot, env.workers, env.total_num_envs, stages, sampler_config(params), lora, compiled)


def validation_plan(params: Params) -> tuple[Episode, ...]:
    """What is played every ``runner.val_check_interval`` iterations: the last held-out init states of every task.

    Raises:
        UserError: more are asked for than there are.
    """
    if params.runner.val_check_interval < 0:
        return ()
    count, episodes = params.runner.val_episodes_per_task, []
    for task in (task for suite in params.suites for task in suite_tasks(suite)):
        available = len(held_out_init_states(task))
        if count > available:
            raise UserError(
                f"runner.val_episodes_per_task is {count}, {task.suite} task {task.task_id} has {available} held-out "
                "init states; ask for fewer"
            )
        for state in range(available - count, available):
            number = len(episodes)
            episodes.append(Episode(number, task.suite, task.task_id, "held_out", state, params.env.seed, number))
    return tuple(episodes)


def validated_states_judged(params: Params) -> int:
    """How many episodes of a validation start where an episode of the final evaluation does: it plays a task's first
    held-out states."""
    evaluation = params.evaluation
    judged = 0 if evaluation.split == "official" else evaluation.episodes_per_task
    return sum(episode.init_state_id < judged for episode in validation_plan(params))


def loop_config(params: Params) -> LoopConfig:
    """The training run."""
    algorithm, env, actor, runner = params.algorithm, params.env.train, params.actor, params.runner
    compat, optim = _compat(params), actor.optim
    if optim.total_training_steps is None:
        optim = replace(optim, total_training_steps=runner.max_epochs)
    return LoopConfig(
        suites=params.suites,
        split=env.split,
        init_state_ids=range(*env.init_state_ids),
        episodes=env.total_num_envs * algorithm.rollout_epoch,
        group_size=algorithm.group_size,
        iterations=runner.max_epochs,
        max_episode_steps=env.max_episode_steps,
        seed=params.seed,
        scene_seed=params.env.seed,
        save_interval=runner.save_interval,
        keep_last=runner.keep_last,
        validation_interval=runner.val_check_interval,
        validation_plan=validation_plan(params),
        final=runner.final_policy,
        train_expert_only=params.openpi.train_expert_only,
        gradient_checkpointing=params.actor.fsdp_config.gradient_checkpointing,
        num_threads=actor.num_threads,
        sharded=actor.fsdp_config.sharding_strategy == "full_shard",
        offload=actor.enable_offload,
        ema_decay=actor.ema_decay,
        rewards=RewardConfig(
            algorithm.reward_coef,
            algorithm.use_rel_reward,
            algorithm.use_step_penalty,
            algorithm.latch_success and not compat,
        ),
        update=UpdateConfig(algorithm, optim, actor.global_batch_size, actor.micro_batch_size, params.seed),
        guards=replace(algorithm, collapse_drop=None, collapse_kl=None) if compat else algorithm,
    )
