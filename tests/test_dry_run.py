"""A dry run: what it leaves as configured and what it cuts; one of the published runs from beginning to end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pi0rl.params import load_params
from pi0rl.policy.config import PI0, PI05
from pi0rl.stages.dry_run import cut, dry_run, shrunk, start_policy

PARAMS = Path(__file__).parents[1] / "params"
PUBLISHED = sorted(path.stem for path in PARAMS.glob("libero_*_openpi.yaml"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_only_the_amount_of_work_is_cut(name: str) -> None:
    params = load_params(PARAMS / f"{name}.yaml")
    small = cut(params, cores=2)
    train = small.env.train
    assert (train.workers, train.total_num_envs, train.max_episode_steps) == (
        2,
        4,
        2 * params.actor.model.num_action_chunks,
    )
    episodes = train.total_num_envs * small.algorithm.rollout_epoch
    assert episodes == (8 if params.algorithm.adv_type == "grpo" else 4)
    same = ("seed", "suites", "cluster", "rollout", "openpi", "fetch")
    assert small.model_dump(include=set(same)) == params.model_dump(include=set(same))
    assert small.actor.optim == params.actor.optim
    assert (small.env.camera_size, small.env.render_profile) == (256, "reference")


@pytest.mark.parametrize("full", [PI0, PI05], ids=["pi0", "pi05"])
def test_a_shrunk_network_sees_and_predicts_as_much(full) -> None:
    small = shrunk(full)
    for name in ("max_token_len", "action_dim", "state_dim", "action_horizon", "pi05", "suffix_len"):
        assert getattr(small, name) == getattr(full, name)
    assert small.vision.num_patches == full.vision.num_patches
    assert (small.text.num_heads, small.text.num_kv_heads) == (full.text.num_heads, full.text.num_kv_heads)


def test_the_start_is_in_the_published_precision() -> None:
    policy = start_policy(load_params(PARAMS / "libero_10_ppo_openpi.yaml"))
    assert policy.model.expert.dtype == torch.bfloat16
    assert policy.value_head is not None
    assert sum(parameter.numel() for parameter in policy.parameters()) < 1e6


@pytest.mark.slow
def test_a_published_run_is_wired(capsys: pytest.CaptureFixture[str]) -> None:
    dry_run("libero_spatial_ppo_openpi", load_params(PARAMS / "libero_spatial_ppo_openpi.yaml"))
    printed = capsys.readouterr().out
    assert "rollout/samples 8" in printed
    assert "actor/optimizer_steps 8" in printed  # two minibatches, four epochs
