"""Params: composed, overridden, interpolated and validated once; a mistake is one line that says what to write."""

from __future__ import annotations

import re
from operator import attrgetter
from pathlib import Path

import pytest
import yaml

from pi0rl.errors import UserError
from pi0rl.params import Params, dump_params, load_params, params_hash
from pi0rl.rlinf_keys import RLINF_KEYS

PARAMS = Path(__file__).parents[1] / "params"

# What RLinf's documentation tells its users to write for pi0 on LIBERO.
RLINF = """
cluster:
  num_nodes: 1
  component_placement:
    env: 0-3
    rollout: 4-7
    actor: 0-7
rollout:
  pipeline_stage_num: 2
actor:
  model:
    num_action_chunks: 5
    num_steps: 4
    action_dim: 7
openpi:
  noise_level: 0.5
  action_chunk: ${actor.model.num_action_chunks}
  num_steps: ${actor.model.num_steps}
  train_expert_only: True
  action_env_dim: ${actor.model.action_dim}
  noise_method: "flow_sde"
  add_value_head: False
video_cfg:
  save_video: True
  info_on_video: True
  video_base_dir: ${runner.logger.log_path}/video/train
runner:
  task_type: embodied
  logger:
    log_path: "../results"
    project_name: rlinf
    experiment_name: "test_openpi"
    logger_backends: ["tensorboard", "wandb"]
"""


def _written(folder: Path, text: str, name: str = "experiment.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(PARAMS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_file_is_valid(path: Path) -> None:
    assert load_params(path).suites


# Values of RLinf's libero_{spatial,object,goal,10}_{ppo,grpo}_openpi.yaml: common ones, by algorithm, by suite.
PUBLISHED: dict[str, object] = {
    "seed": 42,
    "actor.model.variant": "pi0",
    "actor.model.num_steps": 4,
    "actor.model.action_dim": 7,
    "actor.model.precision": None,
    "actor.optim.lr": 5e-6,
    "actor.optim.value_lr": 1e-4,
    "actor.optim.adam_beta1": 0.9,
    "actor.optim.adam_beta2": 0.95,
    "actor.optim.adam_eps": 1e-8,
    "actor.optim.weight_decay": 0.01,
    "actor.optim.lr_scheduler": "constant",
    "actor.optim.lr_warmup_steps": 0,
    "actor.optim.critic_warmup_steps": 0,
    "actor.global_batch_size": 2048,
    "actor.micro_batch_size": 128,
    "openpi.noise_method": "flow_sde",
    "openpi.noise_level": 0.5,
    "openpi.noise_anneal": False,
    "openpi.train_expert_only": True,
    "openpi.joint_logprob": False,
    "openpi.value_after_vlm": False,
    "algorithm.reward_type": "chunk_level",
    "algorithm.logprob_type": "chunk_level",
    "algorithm.entropy_type": "token_level",
    "algorithm.entropy_bonus": 0,
    "algorithm.clip_ratio_low": 0.2,
    "algorithm.clip_ratio_high": 0.2,
    "algorithm.clip_ratio_c": 3.0,
    "algorithm.value_clip": 0.2,
    "algorithm.huber_delta": 10.0,
    "algorithm.gamma": 0.99,
    "algorithm.gae_lambda": 0.95,
    "algorithm.kl_beta": 0,
    "algorithm.loss_agg_func": "token-mean",
    "algorithm.rewards_lower_bound": 0.1,
    "algorithm.rewards_upper_bound": 0.9,
    "algorithm.reward_coef": 1.0,
    "algorithm.use_rel_reward": True,
    "algorithm.use_step_penalty": False,
    "algorithm.normalize_advantages": True,
    "algorithm.rollout_epoch": 8,
    "env.train.total_num_envs": 64,
    "env.seed": 0,
    "env.camera_size": 256,
    "env.settle_steps": 15,
    "runner.max_epochs": 1000,
    "runner.save_interval": 40,
}
BY_ALGORITHM: dict[str, dict[str, object]] = {
    "ppo": {
        "algorithm.adv_type": "gae",
        "algorithm.loss_type": "actor_critic",
        "algorithm.group_size": 1,
        "algorithm.update_epoch": 4,
        "algorithm.filter_rewards": False,
        "openpi.add_value_head": True,
        "openpi.detach_critic_input": True,
    },
    "grpo": {
        "algorithm.adv_type": "grpo",
        "algorithm.loss_type": "actor",
        "algorithm.group_size": 8,
        "algorithm.update_epoch": 2,
        "algorithm.filter_rewards": True,
        "openpi.add_value_head": False,
        "openpi.detach_critic_input": False,
    },
}
# executed chunk, steps per episode, clip_grad, samples per iteration (chunks x envs x epochs), SFT checkpoint
BY_SUITE = {
    "libero_spatial": (5, 240, 1.0, 24576, "Spatial-Object-Goal"),
    "libero_object": (5, 240, 1.0, 24576, "Spatial-Object-Goal"),
    "libero_goal": (5, 320, 1.0, 32768, "Spatial-Object-Goal"),
    "libero_10": (10, 480, 2.0, 24576, "Long"),
}


@pytest.mark.parametrize("algorithm", BY_ALGORITHM)
@pytest.mark.parametrize("suite", BY_SUITE)
def test_published_params_have_the_published_values(suite: str, algorithm: str) -> None:
    params = load_params(PARAMS / f"{suite}_{algorithm}_openpi.yaml")
    for key, expected in {**PUBLISHED, **BY_ALGORITHM[algorithm]}.items():
        assert attrgetter(key)(params) == expected, key
    chunk, steps, clip_grad, samples, checkpoint = BY_SUITE[suite]
    train, settings = params.env.train, params.algorithm
    assert params.suites == (suite,)
    assert (params.actor.model.num_action_chunks, train.max_episode_steps) == (chunk, steps)
    assert params.actor.optim.clip_grad == clip_grad
    assert steps // chunk * train.total_num_envs * settings.rollout_epoch == samples
    assert samples % params.actor.global_batch_size == 0
    assert params.fetch is not None
    assert params.fetch.checkpoint == f"RLinf/RLinf-Pi0-LIBERO-{checkpoint}-SFT"


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        ("{env: 0-3, rollout: 4-7, actor: 0-7}", {"env": "0-3", "rollout": "4-7", "actor": "0-7"}),
        ("{'env,rollout,actor': all}", {"env,rollout,actor": "all"}),
        ("{env: 0-1, rollout: 2-5, actor: 6-7}", {"env": "0-1", "rollout": "2-5", "actor": "6-7"}),
    ],
)
def test_the_three_published_placements(tmp_path: Path, placement: str, expected: dict[str, str]) -> None:
    text = f"cluster:\n  num_nodes: 1\n  component_placement: {placement}\n"
    assert load_params(_written(tmp_path, text)).cluster.component_placement == expected


@pytest.mark.parametrize("other", ["is_lora", "torch_compile"])
def test_spread_weights_do_not_go_with_everything(tmp_path: Path, other: str) -> None:
    text = "actor: {fsdp_config: {sharding_strategy: full_shard}, enable_offload: true, model: {%s: %s}}"
    assert load_params(_written(tmp_path, text % (other, "false"))).actor.enable_offload
    with pytest.raises(UserError, match=f"full_shard does not go with actor.model.{other}; set no_shard"):
        load_params(_written(tmp_path, text % (other, "true")))


def test_a_suite_counts_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="suites: names libero_10 twice; expected each suite once"):
        load_params(_written(tmp_path, "suites: [libero_10, libero_goal, libero_10]"))


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("actor: {fsdp_config: {strategy: fsdp}}", "actor.fsdp_config.strategy: weights are spread as"),
        ("env: {train: {auto_reset: false}}", "algorithm.compat: rlinf"),
        ("actor: {model: {openpi: {noise_level: 0.5}}}", "set openpi at the top level"),
        ("algorithm: {bootstrap_type: always}", "nothing is bootstrapped"),
        ("rollout: {group_name: RolloutGroup}", "leave it out"),
        ("openpi: {config_name: pi0_libero}", "set actor.model.variant"),
    ],
)
def test_rlinfs_other_keys_are_refused_with_a_reason(tmp_path: Path, text: str, hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        load_params(_written(tmp_path, text))


def test_a_hint_names_keys_that_exist() -> None:
    known = dump_params(Params.model_validate({}))
    for key, hint in RLINF_KEYS.items():
        for named in re.findall(r"set ((?:[a-z_]+\.)+[a-z_]+)", hint):
            section: object = yaml.safe_load(known) | {"fetch": {"checkpoint": ""}}
            for part in named.split("."):
                assert isinstance(section, dict)
                assert part in section, f"{key}: {hint}"
                section = section[part]


def test_snippets_of_rlinf_paste_in(tmp_path: Path) -> None:
    params = load_params(_written(tmp_path, RLINF))
    assert params.cluster.component_placement == {"env": "0-3", "rollout": "4-7", "actor": "0-7"}
    assert params.openpi.action_chunk == params.actor.model.num_action_chunks == 5
    assert params.video_cfg.video_base_dir == "../results/video/train"
    assert params.algorithm.adv_type == "grpo"  # no value head


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sead: 1", ("unknown key sead", "did you mean seed?")),
        ("actor: {optim: {larning_rate: 1}}", ("unknown key actor.optim.larning_rate",)),
        ("seed: many", ("seed", "'many'")),
        ("openpi: {noise_method: flow_sed}", ("openpi.noise_method", "flow_sde", "'flow_sed'")),
        ("openpi: {noise_anneal: true, noise_method: flow_noise}", ("openpi.noise_anneal", "flow_noise does not have")),
        ("openpi: {noise_params: [0.7, 0.3, 0]}", ("openpi.noise_params.2", "greater than 0")),
        ("sft: {lora_rank: 4}", ("sft.lora_rank", "sft.checkpoint")),
        ("evaluation: {suites: [libero_10]}", ("evaluation.suites leaves out libero_object", "name it as well")),
        ("openpi: {num_steps: 9}", ("openpi.num_steps is 9", "actor.model.num_steps is 4")),
        ("algorithm: {adv_type: gae}\nopenpi: {add_value_head: false}", ("adv_type gae", "add_value_head: true")),
        ("env: {train: {total_num_envs: 5, workers: 2}}", ("env.train.workers 2", "total_num_envs 5")),
        # trains nothing, or leaves a key without effect
        ("openpi: {noise_method: flow_ode}", ("noise_method flow_ode", "every ratio is 1", "set flow_sde")),
        ("openpi: {noise_method: flow_cps, stochastic_steps: last}", ("flow_cps", "stochastic_steps: one")),
        ("openpi: {noise_method: flow_cps}\nactor: {model: {num_steps: 1}}", ("flow_cps", "num_steps above 1")),
        ("openpi: {noise_level: 0}", ("openpi.noise_level is 0", "nothing is learned")),
        ("openpi: {noise_anneal: true, noise_params: [0.7, 0, 400]}", ("openpi.noise_params is 0",)),
        ("algorithm: {filter_rewards: true}", ("filter_rewards", "group_size is 1")),
        ("openpi: {joint_logprob: true, stochastic_steps: last}", ("joint_logprob", "stochastic_steps last")),
        ("openpi: {ignore_last: true, stochastic_steps: all}", ("ignore_last", "stochastic_steps all")),
        ("openpi: {ignore_last: true, joint_logprob: true}", ("ignore_last", "joint_logprob")),
        ("openpi: {chunk_critic_input: true, value_after_vlm: true}", ("chunk_critic_input", "value_after_vlm")),
        ("algorithm: {entropy_bonus: 0.01}", ("entropy_bonus", "noise_method: flow_noise")),
        # cannot be read
        ("seed: ${nowhere.key}", ("cannot resolve an interpolation", "nowhere")),
        ("- 1", ("expected a mapping",)),
        ("a: [", ("not valid YAML",)),
    ],
)
def test_a_mistake_is_one_line_that_helps(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        load_params(_written(tmp_path, text))
    message = str(caught.value)
    assert "\n" not in message
    assert "experiment.yaml" in message
    assert all(word in message for word in words), message


def test_a_missing_file_names_the_known_ones(tmp_path: Path) -> None:
    _written(tmp_path, "seed: 0", "other.yaml")
    with pytest.raises(UserError, match="known ones: other"):
        load_params(tmp_path / "experiment.yaml")


def test_overrides_come_last_and_base_first(tmp_path: Path) -> None:
    _written(tmp_path, "seed: 1\nsft: {steps: 10, lr: 0.5}", "lower.yaml")
    path = _written(tmp_path, "base: lower.yaml\nsft: {steps: 20}")
    params = load_params(path, ("sft.batch_size=8", "seed=3"))
    assert (params.seed, params.sft.steps, params.sft.lr, params.sft.batch_size) == (3, 20, 0.5, 8)


def test_the_suites_of_the_evaluation_are_those_trained_on_unless_named(tmp_path: Path) -> None:
    """Params that were frozen before the key existed mean the same, and are written back without it."""
    frozen = _written(tmp_path, "suites: [libero_goal]\nevaluation: {split: held_out}")
    params = load_params(frozen)
    assert params.evaluated_suites == ("libero_goal",)
    assert "suites" not in yaml.safe_load(dump_params(params))["evaluation"]
    more = load_params(frozen, ("evaluation.suites=[libero_goal, libero_10]",))
    assert more.evaluated_suites == ("libero_goal", "libero_10")
    assert yaml.safe_load(dump_params(more))["evaluation"]["suites"] == ["libero_goal", "libero_10"]
    assert load_params(PARAMS / "libero_10_grpo_openpi.yaml").evaluated_suites == tuple(BY_SUITE)
    tiny = [path for path in PARAMS.glob("*.yaml") if not path.stem.endswith("_openpi")]
    assert all(load_params(path).evaluation.suites is None for path in tiny)


def test_base_files_in_a_circle_are_refused(tmp_path: Path) -> None:
    _written(tmp_path, "base: b.yaml", "a.yaml")
    _written(tmp_path, "base: a.yaml", "b.yaml")
    with pytest.raises(UserError, match="circle"):
        load_params(tmp_path / "a.yaml")


def test_dumped_params_read_back_the_same(tmp_path: Path) -> None:
    params = load_params(PARAMS / "quickstart.yaml")
    again = load_params(_written(tmp_path, dump_params(params)))
    assert again == params
    assert params_hash(again) == params_hash(params)
    assert set(yaml.safe_load(dump_params(params))) == set(Params.model_fields)
