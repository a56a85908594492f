"""Imitation from a checkpoint, through the stage: any layout, its statistics replaced, its origin recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_policy_checkpoints import write_lerobot, write_openpi
from tiny_demonstrations import make_demonstrations
from tiny_policies import make_policy

from pi0rl.errors import UserError
from pi0rl.experiment import Experiment
from pi0rl.params import load_params
from pi0rl.policy.checkpoints import load_policy, save_policy
from pi0rl.policy.config import TINY
from pi0rl.policy.foreign import EMBEDDING, NORM_STATS
from pi0rl.policy.policy import Policy, create_policy
from pi0rl.policy.sources import ORIGIN
from pi0rl.policy.weights import sha256
from pi0rl.sft.demonstrations import load
from pi0rl.stages import sft

QUICKSTART = Path(__file__).parents[1] / "params" / "quickstart.yaml"
SMALL = (
    "sft.target_success=null",
    "suites=[libero_goal]",
    "sft.steps=2",
    "sft.batch_size=4",
    "sft.warmup_steps=1",
    "sft.num_threads=1",
)
ADAPTED = "paligemma_with_expert.paligemma.model.language_model.layers.0.self_attn.q_proj.weight"
EXPERT = "paligemma_with_expert.gemma_expert.model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demonstrations(tmp_path_factory.mktemp("demos"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model as openpi has it: of sizes that its shapes tell, and without statistics of LIBERO."""
    tiny = make_policy()
    vision = replace(TINY.vision, width=72, num_heads=1)
    folder = tmp_path / "base"
    folder.mkdir()
    write_openpi(create_policy(replace(TINY, vision=vision), tiny.processing, 0), folder)
    (folder / NORM_STATS).unlink()
    return folder


def train(demos: Path, folder: Path, checkpoint: str | Path, *overrides: str) -> Path:
    """The policy that the stage leaves."""
    params = load_params(QUICKSTART, (*SMALL, f"sft.checkpoint={checkpoint}", *overrides))
    folders = {"demos": demos, "sft": folder / "sft"}
    sft.run(cast(Experiment, SimpleNamespace(params=params, stage_dir=folders.__getitem__)))
    return folder / "sft" / "policy"


def test_a_base_model_takes_the_statistics_of_what_it_predicts(demos: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"norm_stats.json, without which .* train a base model on demonstrations"):
        load_policy(base)
    trained = train(demos, tmp_path, base, "sft.lora_rank=2")
    processing, seen = load_policy(trained).processing, load(demos)
    assert processing.delta_actions
    np.testing.assert_allclose(processing.state_norm.first, seen.state.mean(0), rtol=1e-5, atol=1e-6)
    relative = []  # every step's window of actions, ending with its episode, minus the state at its start
    for step in range(len(seen)):
        last = np.flatnonzero(seen.episode == seen.episode[step])[-1]
        window = seen.actions[np.minimum(np.arange(step, step + TINY.action_horizon), last)].astype(np.float64)
        window[:, :6] -= seen.state[step, :6]
        relative.append(window)
    np.testing.assert_allclose(processing.action_norm.first, np.concatenate(relative).mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(processing.action_norm.second, np.concatenate(relative).std(0), rtol=1e-5)

    origin = json.loads((trained / ORIGIN).read_text())
    assert (origin["kind"], origin["location"], origin["layout"]) == ("directory", str(base), "openpi")
    assert origin["sha256"]["model.safetensors"] == sha256(base / "model.safetensors")

    before, after = load_file(base / "model.safetensors"), load_file(trained / "model.safetensors")
    assert not any("lora" in name for name in after)
    assert torch.equal(after[EMBEDDING], before["paligemma_with_expert.paligemma.lm_head.weight"])
    changed = {name for name in (ADAPTED, EXPERT) if not torch.equal(after[name], before[name])}
    assert changed == {ADAPTED, EXPERT}  # adapters, merged, and the expert itself


def test_expert_only_leaves_the_base_model(demos: Path, base: Path, tmp_path: Path) -> None:
    trained = train(demos, tmp_path, base, "sft.train_expert_only=true")
    before, after = load_file(base / "model.safetensors"), load_file(trained / "model.safetensors")
    assert torch.equal(after[ADAPTED], before[ADAPTED])
    assert not torch.equal(after[EXPERT], before[EXPERT])


def test_own_checkpoints_keep_how_actions_are_normalised(demos: Path, tmp_path: Path) -> None:
    policy = make_policy()
    quantile = replace(policy.processing.action_norm, method="quantile")
    policy.processing = replace(policy.processing, action_norm=quantile)
    save_policy(policy, tmp_path / "own")
    processing, card = load_policy(train(demos, tmp_path, tmp_path / "own")).processing, load(demos).card
    statistics = card["norm_stats"]
    assert processing.action_norm == replace(
        quantile, first=tuple(statistics["actions"]["q01"]), second=tuple(statistics["actions"]["q99"])
    )
    assert processing.state_norm.first == tuple(statistics["state"]["mean"])


def without_state_files(folder: Path) -> None:
    """As LeRobot saves a pipeline that was never given statistics."""
    for file in ("policy_preprocessor", "policy_postprocessor"):
        (folder / f"{file}_0.safetensors").unlink()
        pipeline = json.loads((folder / f"{file}.json").read_text())
        del pipeline["steps"][0]["state_file"]
        (folder / f"{file}.json").write_text(json.dumps(pipeline))


@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
@pytest.mark.parametrize(
    ("write", "strip"),
    [(write_openpi, lambda folder: (folder / NORM_STATS).unlink()), (write_lerobot, without_state_files)],
    ids=["openpi", "lerobot"],
)
def test_statistics_are_missed_by_those_who_act_alone(
    tmp_path: Path, write: Callable[[Policy, Path], None], strip: Callable[[Path], None], pi05: bool
) -> None:
    tiny = make_policy(pi05=pi05)
    write(
        create_policy(replace(tiny.config, vision=replace(TINY.vision, width=72, num_heads=1)), tiny.processing, 0),
        tmp_path,
    )
    whole = load_policy(tmp_path).processing
    strip(tmp_path)
    with pytest.raises(UserError, match="this policy cannot act"):
        load_policy(tmp_path)
    bare = load_policy(tmp_path, statistics=False).processing
    for before, after in ((whole.state_norm, bare.state_norm), (whole.action_norm, bare.action_norm)):
        assert after == replace(before, first=(), second=())


def test_a_start_is_named_as_in_fetch(demos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without revision too: what follows is the hub's, which has no such model."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("someone/pi0", "someone/pi0@main"):
        with pytest.raises(UserError, match=rf"^{name}: no such folder, not in the hub's local cache"):
            train(demos, tmp_path, name)


def test_a_saved_state_is_of_one_start_and_left_with_a_word(
    demos: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What changes no byte of the policy, as the interval at which it is saved, keeps the state's kind."""

    def kind(*overrides: str, origin: dict[str, Any] | None = None) -> str:
        return sft._kind(load_params(QUICKSTART, (*SMALL, *overrides)), {"fingerprint": "f"}, origin)

    assert kind() == kind("sft.save_interval=7") != kind("sft.batch_size=8")
    digests = [{"sha256": {"model.safetensors": digest}} for digest in ("a", "b")]
    assert len({kind(), *(kind(origin=origin) for origin in digests)}) == 3

    state = tmp_path / ".sft.training.partial"
    torch.save({"kind": "another", "rows": [{}], "training": {}}, state)
    train(demos, tmp_path, base)
    assert f"{state} was saved with other params" in capsys.readouterr().out
    assert not state.exists()


@pytest.mark.parametrize(("target", "success", "reached"), [(0.5, 0.4, False), (0.5, 0.5, True), (0.0, 0.0, True)])
def test_training_ends_where_the_success_wanted_is_reached(target: float, success: float, reached: bool) -> None:
    params = load_params(QUICKSTART, (f"sft.target_success={target}",))
    assert sft._reached(params, [{"sft/success_once": success}]) is reached
    assert sft._reached(params, [{}]) is sft._reached(params, []) is False
