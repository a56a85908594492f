"""The memory plan: predictions against what a process really takes, and a plan for every experiment."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_policies import SDE

from pi0rl.params import Params, load_params
from pi0rl.plan import GIB, MAIN, _with, describe, make_plan, print_plan, remedies
from pi0rl.policy.config import TINY
from pi0rl.policy.critic import CriticConfig
from pi0rl.policy.memory import MemoryConfig, predict
from pi0rl.policy.policy import create_policy
from pi0rl.policy.processing import mean_std, tiny_processing

PARAMS = Path(__file__).parent.parent / "params"
BATCH = 512
TINY_UPDATE = MemoryConfig(
    TINY, CriticConfig("expert", (128, 64)), None, SDE, "fp32", True, False, 16, BATCH, language=14, gpu=False
)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_an_update_takes_what_was_predicted(checkpointing: bool) -> None:
    predicted = predict(replace(TINY_UPDATE, gradient_checkpointing=checkpointing)).update
    script = Path(__file__).with_name("memory_of_an_update.py")
    arguments = [str(BATCH), "checkpointing" if checkpointing else "kept"]
    returning = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory goes back to the system at once
    command = [sys.executable, script, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=returning)
    measured = int(result.stdout)
    print(f"predicted {predicted / 2**20:.0f} MiB, measured {measured / 2**20:.0f}: {predicted / measured - 1:+.1%}")
    assert predicted == pytest.approx(measured, rel=0.15)


def test_weights_are_counted_as_they_are() -> None:
    memory = predict(TINY_UPDATE)
    unused = mean_std(np.zeros((2, 8)))
    policy = create_policy(TINY, tiny_processing(TINY, unused, unused, ("push",)), 0, TINY_UPDATE.critic)
    assert memory.weights == sum(parameter.nbytes for parameter in policy.parameters())
    trained = policy.trainable_parameters(train_expert_only=True).values()
    assert memory.gradients == sum(parameter.nbytes for parameter in trained)
    assert predict(replace(TINY_UPDATE, precision="bf16")).weights < 0.6 * memory.weights


@pytest.mark.parametrize("name", sorted(path.stem for path in PARAMS.glob("*.yaml")))
def test_every_experiment_has_a_plan(name: str) -> None:
    params = load_params(PARAMS / f"{name}.yaml")
    plan = make_plan(params, gpus=1, gpu_gib=80.0, main_gib=1000.0)
    assert not plan.too_full
    text = describe(name, params, plan)
    assert all(device in text for device in plan.capacity)
    shared = any(line.component == "both" for line in plan.lines)  # weights that rollout and actor hold in one process
    assert {line.component for line in plan.lines} == {"env", "rollout", "actor", *(["both"] if shared else [])}


def test_adapters_are_cheaper_than_training_the_vlm() -> None:
    config = replace(TINY_UPDATE, precision="bf16", train_expert_only=False)
    whole, adapters = predict(config), predict(replace(config, lora_rank=4))
    frozen = predict(replace(config, train_expert_only=True))
    added = adapters.parameters - whole.parameters
    assert adapters.trained == frozen.trained + added
    assert adapters.weights == whole.weights + 4 * added  # adapters are float32
    assert adapters.gradients < whole.gradients
    assert frozen.update < adapters.update  # the VLM's graph is kept
    params = on_a_gpu("openpi.train_expert_only=false", "actor.model.lora_rank=4")
    plan = make_plan(params, 1, 0.1, 100.0)
    assert "actor.model.is_lora=true" in dict(remedies(params, plan, 1, 0.1, 100.0))


def on_a_gpu(*overrides: str) -> Params:
    placement = "cluster.component_placement={env: cpu, rollout: 0, actor: 0}"
    return load_params(
        PARAMS / "quickstart.yaml",
        (placement, "actor.micro_batch_size=1024", "actor.global_batch_size=1024", *overrides),
    )


def test_remedies_are_plans_that_need_less() -> None:
    params = on_a_gpu()
    whole = make_plan(params, 1, 80.0, 100.0)
    short = (whole.total("GPU 0") - 0.05 * GIB) / GIB
    plan = make_plan(params, 1, short, 100.0)
    assert plan.too_full == ["GPU 0"]
    found = dict(remedies(params, plan, 1, short, 100.0))
    assert not found["actor.micro_batch_size=128"].too_full
    assert all(other.total("GPU 0") < plan.total("GPU 0") for other in found.values())


def test_spread_weights_and_moments_in_main_memory_leave_room(capsys: pytest.CaptureFixture[str]) -> None:
    placement = "cluster.component_placement={env: cpu, rollout: 0-3, actor: 0-7}"
    overrides = (placement, "openpi.train_expert_only=false", "actor.micro_batch_size=8")
    params = load_params(PARAMS / "libero_10_ppo_openpi.yaml", overrides)
    sharded = _with(params, {"actor.fsdp_config.sharding_strategy": "full_shard"})
    offloaded = _with(sharded, {"actor.enable_offload": True})
    whole, shared, both = (make_plan(each, 8, 80.0, 1000.0) for each in (params, sharded, offloaded))
    memory = whole.memory
    for device in ("GPU 0", "GPU 7"):
        saved = whole.total(device) - shared.total(device)
        kept = 7 / 8 * (memory.weights + memory.gradients + memory.optimizer)
        # all that is kept, or less where the whole weights of the rollout's turn are now the most
        assert 7 / 8 * (memory.gradients + memory.optimizer) - 1 <= saved <= kept + 1
        assert shared.total(device) - both.total(device) >= 0
    assert both.total(MAIN) - shared.total(MAIN) == pytest.approx(memory.optimizer)
    print_plan("mine", sharded, 8, 80.0, 1000.0)
    assert "weights, one of 8 parts" in capsys.readouterr().out


def test_the_printed_plan_says_whether_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert print_plan("here", on_a_gpu(), gpus=1, gpu_gib=80.0, main_gib=100.0) == 0
    assert "What would help" not in capsys.readouterr().out
    assert print_plan("here", on_a_gpu(), gpus=1, gpu_gib=80.0, main_gib=0.5) == 1
    printed = capsys.readouterr().out
    assert f"{MAIN}: " in printed
    assert "too much" in printed
