"""``algorithm.compat: rlinf``: one flag away from what RLinf does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_workers import played, quickstart, start_rollout
from tiny_policies import PREFIX_CRITIC, make_policy

from pi0rl.cluster.iterations import iteration_plan
from pi0rl.cluster.setup import critic_config, loop_config, players_config, sampler_config
from pi0rl.params import Params
from pi0rl.policy.checkpoints import save_policy
from pi0rl.rlinf_keys import rlinf_hint

COMPAT = "algorithm.compat=rlinf"

# The keys of RLinf's libero_*_openpi.yaml and of the files that they include.
KEYS = """
runner.task_type runner.max_epochs runner.max_steps runner.only_eval runner.eval_policy_path
runner.val_check_interval runner.save_interval runner.seq_length runner.max_prompt_length runner.resume_dir
runner.ckpt_path runner.logger.log_path algorithm.auto_reset algorithm.ignore_terminations
algorithm.use_fixed_reset_state_ids algorithm.specific_reset_id algorithm.normalize_advantages
algorithm.kl_penalty algorithm.group_size algorithm.max_episode_steps algorithm.use_ordered_reset_state_ids
algorithm.reward_coef algorithm.n_chunk_steps algorithm.n_eval_chunk_steps algorithm.num_group_envs
algorithm.rollout_epoch algorithm.eval_rollout_epoch algorithm.reward_type algorithm.logprob_type
algorithm.entropy_type algorithm.update_epoch algorithm.adv_type algorithm.loss_type algorithm.loss_agg_func
algorithm.kl_beta algorithm.entropy_bonus algorithm.clip_ratio_high algorithm.clip_ratio_low
algorithm.clip_ratio_c algorithm.value_clip algorithm.huber_delta algorithm.gamma algorithm.gae_lambda
algorithm.filter_rewards algorithm.rewards_lower_bound algorithm.rewards_upper_bound algorithm.sampling_params
algorithm.length_params algorithm.clip_log_ratio_min algorithm.clip_log_ratio_max env.group_name env.channel
env.enable_offload env.train.total_num_envs env.train.max_episode_steps env.train.max_steps_per_rollout_epoch
env.train.reward_coef env.train.auto_reset env.train.ignore_terminations env.train.use_rel_reward
env.train.group_size env.train.seed env.train.reset_gripper_open env.train.use_fixed_reset_state_ids
env.train.use_ordered_reset_state_ids env.train.rollout_epoch env.train.is_eval env.train.specific_reset_id
env.train.video_cfg env.train.init_params env.train.task_suite_name env.train.env_type env.eval.total_num_envs
env.eval.auto_reset env.eval.ignore_terminations env.eval.max_episode_steps env.eval.max_steps_per_rollout_epoch
env.eval.group_size env.eval.use_fixed_reset_state_ids env.eval.use_ordered_reset_state_ids env.eval.is_eval
env.eval.video_cfg env.eval.rollout_epoch rollout.group_name rollout.channel rollout.mode
rollout.generation_backend rollout.backend rollout.model_dir rollout.precision rollout.recompute_logprobs
rollout.unnorm_key rollout.enable_offload rollout.pipeline_stage_num rollout.model actor.group_name
actor.channel actor.training_backend actor.checkpoint_load_path actor.checkpoint_save_path
actor.micro_batch_size actor.global_batch_size actor.seed actor.enable_offload actor.model.model_name
actor.model.model_type actor.model.model_path actor.model.precision actor.model.num_action_chunks
actor.model.action_dim actor.model.action_horizon actor.model.is_lora actor.model.lora_rank
actor.model.lora_alpha actor.model.lora_path actor.model.gradient_checkpointing actor.model.use_wrist_image
actor.model.use_proprio actor.model.num_steps actor.model.add_value_head actor.model.openpi
actor.model.num_images_in_input openpi.config_name openpi.num_images_in_input openpi.noise_level
openpi.action_chunk openpi.num_steps openpi.train_expert_only openpi.action_env_dim openpi.noise_method
openpi.add_value_head openpi.detach_critic_input openpi.noise_anneal openpi.noise_params
openpi.noise_logvar_range openpi.joint_logprob openpi.value_after_vlm openpi.value_vlm_mode
openpi.chunk_critic_input openpi.safe_get_logprob openpi.ignore_last openpi.action_horizon actor.optim.lr
actor.optim.value_lr actor.optim.adam_beta1 actor.optim.adam_beta2 actor.optim.adam_eps actor.optim.weight_decay
actor.optim.clip_grad actor.optim.critic_warmup_steps actor.optim.lr_scheduler actor.optim.lr_warmup_steps
actor.optim.total_training_steps actor.optim.min_lr actor.optim.min_lr_rate actor.optim.lr_warmup_steps_ratio
actor.optim.optimizer actor.fsdp_config.strategy reward critic defaults
hydra weight_syncer cluster.num_nodes cluster.component_placement
"""


def test_episodes_go_on_to_the_horizon_and_nothing_is_latched() -> None:
    for overrides, after, latched in (((), "stop", True), ((COMPAT,), "continue", False)):
        params = quickstart(*overrides)
        assert players_config(params, params.env.train).slot.after_success == after
        assert players_config(params, params.env.eval).slot.after_success == "stop"
        assert loop_config(params).rewards.latch_success is latched


def test_values_need_not_match_and_nobody_watches_for_a_collapse() -> None:
    for overrides, ours in (((), True), ((COMPAT,), False)):
        params = quickstart(*overrides)
        critic, guards = critic_config(params), loop_config(params).guards
        assert critic is not None
        assert critic.matches_rollout is ours
        assert (guards.collapse_drop is not None, guards.collapse_kl is not None) == (ours, ours)
    assert loop_config(quickstart(COMPAT, "algorithm.max_rollbacks=7")).guards.max_rollbacks == 7


def test_init_states_are_drawn_without_repetition_or_independently() -> None:
    def starts(*overrides: str) -> list[tuple[int, int]]:
        params = quickstart("env.train.total_num_envs=100", "algorithm.rollout_epoch=1", *overrides)
        plan = iteration_plan(loop_config(params), 3)
        assert plan == iteration_plan(loop_config(params), 3)
        return [(row.task_id, row.init_state_id) for row in plan]

    counts = [[task for task, _ in drawn].count(0) for drawn in (starts(), starts(COMPAT))]
    assert counts[0] == 10 != counts[1]
    assert len(set(starts())) == 100
    assert len(set(starts(COMPAT))) < 100


def test_a_schedule_is_as_long_as_the_run() -> None:
    assert loop_config(quickstart()).update.optim.total_training_steps == quickstart().runner.max_epochs
    assert loop_config(quickstart("actor.optim.total_training_steps=7")).update.optim.total_training_steps == 7


@pytest.mark.parametrize(("overrides", "shared"), [((), False), ((COMPAT,), True)], ids=["ours", "rlinf"])
def test_the_denoising_step_is_drawn_per_sample_or_for_all(
    tmp_path: Path, overrides: tuple[str, ...], shared: bool
) -> None:
    params = quickstart("openpi.stochastic_steps=one", *overrides)
    save_policy(make_policy(PREFIX_CRITIC), tmp_path / "policy")
    rollout = start_rollout(params, tmp_path / "policy")
    steps = []
    for iteration in range(4):  # of 4 episodes of 3 chunks
        episodes = played(params, rollout, iteration)
        steps.append(np.stack([episode.denoise_inds[:, 0] for episode in episodes]))
    chosen = np.stack(steps)
    assert set(np.unique(chosen)) <= set(range(sampler_config(params).num_steps))
    assert len(np.unique(chosen[:, 0])) > 1  # over chunks and iterations it differs all the same
    assert all(len(set(chunk)) == 1 for each in chosen for chunk in each.T) is shared


def test_every_key_of_rlinf_is_known_or_refused_with_a_reason() -> None:
    def known(key: str) -> bool:
        section: object = Params()
        for name in key.split("."):
            if not hasattr(section, name):
                return False
            section = getattr(section, name)
        return True

    assert [key for key in KEYS.split() if not known(key) and rlinf_hint(key) is None] == []
