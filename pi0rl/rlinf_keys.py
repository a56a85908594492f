"""RLinf's params keys that stand elsewhere here or nowhere: what somebody who pastes one in is told.

All its other keys for pi0 on LIBERO are ours too, under the same name. Patterns are of :mod:`fnmatch`; the first match
counts.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

_PLUMBING = "names RLinf's processes and queues, which need none here; leave it out"
_PLAN = "the episode plan decides which states are played; choose them with env.train.init_state_ids"
_ENDS = (
    "an episode ends with success or at max_episode_steps, and its slot takes the next one of the plan; to play on to "
    "the horizon as RLinf does set algorithm.compat: rlinf"
)
_LANGUAGE = "belongs to language models; a flow policy has no such setting; leave it out"
_FIXED_EVALUATION = "the evaluation plays a fixed plan once: see evaluation.split and evaluation.episodes_per_task"

RLINF_KEYS: dict[str, str] = {
    "defaults": "a params file is laid over another one with `base: other.yaml`",
    "hydra": "Hydra is not used; overrides are given as --set key=value",
    "weight_syncer": "weights are handed over after every iteration as the placement allows; leave it out",
    "reward": "the reward is LIBERO's success, shaped by algorithm.reward_coef, use_rel_reward and use_step_penalty",
    "critic": "the critic is the value head: openpi.add_value_head",
    "*.group_name": _PLUMBING,
    "*.channel": _PLUMBING,
    "runner.max_steps": "the run's length is runner.max_epochs iterations; leave it out",
    "runner.only_eval": "run `pi0rl evaluate` instead",
    "runner.eval_policy_path": "run `pi0rl evaluate --checkpoint` with it",
    "runner.resume_dir": "an interrupted training goes on by itself when the same command is run again",
    "runner.ckpt_path": "set fetch.checkpoint",
    "runner.seq_length": _LANGUAGE,
    "runner.max_prompt_length": _LANGUAGE,
    "runner.weight_sync_interval": "rollouts always use the newest weights (an interval of 1); leave it out",
    "algorithm.auto_reset": _ENDS,
    "algorithm.ignore_terminations": _ENDS,
    "algorithm.use_fixed_reset_state_ids": _PLAN,
    "algorithm.use_ordered_reset_state_ids": _PLAN,
    "algorithm.specific_reset_id": _PLAN,
    "algorithm.max_episode_steps": "set env.train.max_episode_steps",
    "algorithm.n_chunk_steps": "follows from env.train.max_episode_steps and actor.model.num_action_chunks",
    "algorithm.n_eval_chunk_steps": "follows from the suite's step limit and actor.model.num_action_chunks",
    "algorithm.num_group_envs": "set env.train.total_num_envs",
    "algorithm.eval_rollout_epoch": _FIXED_EVALUATION,
    "algorithm.bootstrap_type": "the time limit ends an episode and nothing is bootstrapped, as in RLinf's LIBERO runs",
    "algorithm.sampling_params": _LANGUAGE,
    "algorithm.length_params": _LANGUAGE,
    "env.group_size": "set algorithm.group_size",
    "env.obs_compression": "images go through Ray's shared memory uncompressed; leave it out",
    "env.*.rollout_epoch": "set algorithm.rollout_epoch (training); " + _FIXED_EVALUATION,
    "env.*.group_size": "set algorithm.group_size",
    "env.*.reward_coef": "set algorithm.reward_coef",
    "env.*.use_rel_reward": "set algorithm.use_rel_reward",
    "env.*.use_step_penalty": "set algorithm.use_step_penalty",
    "env.*.auto_reset": _ENDS,
    "env.*.ignore_terminations": _ENDS,
    "env.*.max_steps_per_rollout_epoch": "equals env.train.max_episode_steps; leave it out",
    "env.eval.max_episode_steps": "the evaluation allows each suite's own limit (openpi's); leave it out",
    "env.*.use_*_reset_state_ids": _PLAN,
    "env.*.specific_reset_id": _PLAN,
    "env.*.is_eval": _FIXED_EVALUATION,
    "env.*.seed": "set env.seed",
    "env.*.reset_gripper_open": "the gripper is always opened while a scene settles (env.settle_steps); leave it out",
    "env.*.task_suite_name": "set suites, a list",
    "env.*.env_type": "there is LIBERO only; leave it out",
    "env.*.simulator_type": "there is LIBERO only; leave it out",
    "env.*.video_cfg": "set video_cfg at the top level",
    "env.*.init_params": "set env.camera_size",
    "env.*.num_envs": "set env.train.total_num_envs or env.eval.total_num_envs",
    "rollout.mode": "follows from cluster.component_placement; leave it out",
    "rollout.backend": "there is PyTorch only; leave it out",
    "rollout.generation_backend": "there is PyTorch only; leave it out",
    "rollout.model_dir": "set fetch.checkpoint",
    "rollout.model": "set actor.model (rollout and learner have the same) and fetch.checkpoint",
    "rollout.precision": "set actor.model.precision",
    "rollout.recompute_logprobs": "the rollout's log-probs are kept, and checked by algorithm.ratio_tolerance",
    "rollout.unnorm_key": "statistics travel inside the checkpoint; leave it out",
    "actor.training_backend": "follows from cluster.component_placement; leave it out",
    "actor.checkpoint_load_path": "set fetch.checkpoint",
    "actor.checkpoint_save_path": "checkpoints go to the run folder; choose it with --output",
    "actor.seed": "set seed",
    "actor.optim.min_lr": "give it as a share of lr: actor.optim.min_lr_rate",
    "actor.optim.lr_warmup_steps_ratio": "give the RL iterations themselves: actor.optim.lr_warmup_steps",
    "actor.optim.optimizer": "there is AdamW only; leave it out",
    "actor.model.gradient_checkpointing": "set actor.fsdp_config.gradient_checkpointing",
    "actor.model.action_horizon": "follows from the checkpoint; leave it out",
    "actor.model.num_images_in_input": "both cameras are always used; leave it out",
    "actor.fsdp_config.*": "weights are spread as actor.fsdp_config.sharding_strategy says; leave it out",
    "actor.model.model_name": "set actor.model.variant: pi0 or pi05",
    "actor.model.model_type": "set actor.model.variant: pi0 or pi05",
    "actor.model.model_path": "set fetch.checkpoint",
    "actor.model.openpi": "set openpi at the top level, with the same keys",
    "actor.model.add_value_head": "set openpi.add_value_head",
    "actor.model.lora_path": "adapters are merged into the policies that are saved: set fetch.checkpoint to one",
    "actor.model.lora_alpha": "equals lora_rank, as in RLinf; leave it out",
    "actor.model.lora_*": "adapters are given by is_lora and lora_rank alone; leave it out",
    "actor.model.use_wrist_image": "both cameras are always used; leave it out",
    "actor.model.use_proprio": "follows from the checkpoint; leave it out",
    "openpi.config_name": "set actor.model.variant: pi0 or pi05",
    "openpi.action_horizon": "follows from the checkpoint; leave it out",
    "openpi.num_images_in_input": "both cameras are always used; leave it out",
}


def rlinf_hint(key: str) -> str | None:
    """What to do instead of RLinf's ``key`` (dotted), or None if it is not one of them."""
    return next((hint for pattern, hint in RLINF_KEYS.items() if fnmatchcase(key, pattern)), None)
