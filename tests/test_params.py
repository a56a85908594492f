"""Params: composed, overridden, interpolated and validated once; a mistake is one line that says what to write."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pi0rl.errors import UserError
from pi0rl.params import Params, dump_params, load_params, params_hash

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
        ("openpi: {num_steps: 9}", ("openpi.num_steps is 9", "actor.model.num_steps is 4")),
        ("algorithm: {adv_type: gae}\nopenpi: {add_value_head: false}", ("adv_type gae", "add_value_head: true")),
        ("env: {train: {total_num_envs: 5, workers: 2}}", ("env.train.workers 2", "total_num_envs 5")),
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
