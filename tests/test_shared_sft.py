"""Imitation in several processes: the stage on two nodes makes the steps of one, and goes on to the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
from ray.cluster_utils import Cluster
from safetensors.torch import load_file
from tiny_demonstrations import make_demonstrations
from torch import Tensor

from pi0rl.experiment import Experiment
from pi0rl.params import Params, load_params
from pi0rl.progress import Progress
from pi0rl.stages import sft

QUICKSTART = Path(__file__).parents[1] / "params" / "quickstart.yaml"
SMALL = (
    "suites=[libero_goal]",
    "sft.steps=6",
    "sft.batch_size=7",  # four samples for one process, three for the other
    "sft.warmup_steps=2",
    "sft.image_shift=2",
    "sft.augmentation=openpi",
    "sft.ema_decay=0.8",
    "sft.val_demos_per_task=1",
    "sft.val_check_start=3",
    "sft.val_check_interval=3",
    "sft.num_threads=1",
    "sft.save_interval=2",
    "sft.target_success=null",
)
EVERYBODY = "cluster.component_placement={'env,rollout': cpu, actor: {node_group: node, placement: 0-1}}"


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demonstrations(tmp_path_factory.mktemp("demos"))


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[str]:
    node = {"num_cpus": 2, "num_gpus": 0, "object_store_memory": 2**28}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node)
    yield cluster.address
    cluster.shutdown()


def run(demos: Path, folder: Path, *overrides: str) -> tuple[dict[str, Tensor], pd.DataFrame]:
    """What the stage leaves: weights, and the curve."""
    params: Params = load_params(QUICKSTART, (*SMALL, *overrides))
    folders = {"demos": demos, "sft": folder / "sft"}
    sft.run(cast(Experiment, SimpleNamespace(params=params, stage_dir=folders.__getitem__)))
    return load_file(folder / "sft/policy/model.safetensors"), pd.read_csv(folder / "sft/metrics.csv")


def test_two_processes_make_the_steps_of_one(
    demos: Path, two_nodes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, curve = run(demos, tmp_path / "alone")
    both = ("cluster.num_nodes=2", f"cluster.address={two_nodes}", EVERYBODY)
    together, shared_curve = run(demos, tmp_path / "together", *both)
    assert curve["sft/val_loss"].notna().sum() == 2
    np.testing.assert_allclose(shared_curve.to_numpy(), curve.to_numpy(), rtol=1e-4)
    for name, weight in alone.items():
        torch.testing.assert_close(together[name], weight, rtol=1e-3, atol=2e-4)

    shown = Progress.update

    def killed(self: Progress, done: int, *more: Any) -> None:
        if done == 5:
            raise KeyboardInterrupt
        shown(self, done, *more)

    monkeypatch.setattr(Progress, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        run(demos, tmp_path / "resumed", *both)
    monkeypatch.setattr(Progress, "update", shown)
    taken: list[int] = []
    monkeypatch.setattr(Progress, "update", lambda self, done, *more: taken.append(done))
    resumed, resumed_curve = run(demos, tmp_path / "resumed", *both)
    assert taken == [5, 6]
    pd.testing.assert_frame_equal(resumed_curve, shared_curve)
    assert all(torch.equal(resumed[name], weight) for name, weight in together.items())


@pytest.mark.slow
def test_success_is_measured_where_the_training_is(demos: Path, two_nodes: str, tmp_path: Path) -> None:
    both = ("cluster.num_nodes=2", f"cluster.address={two_nodes}", EVERYBODY)
    measured = ("sft.steps=3", "sft.target_success=0.5", "sft.val_episodes_per_task=1", "sft.augmentation=none")
    _, curve = run(demos, tmp_path, *both, *measured)
    assert curve["sft/success_once"].notna().tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("placement", "device", "processes"),
    [
        ("{'env,rollout,actor': cpu}", "cpu", 1),
        ("{'env,rollout,actor': all}", "cpu", 1),  # the placement is the learner's: imitation stays on its cores
        ("{'env,rollout': cpu, actor: {node_group: node, placement: 0-1}}", "cpu", 2),
        ("{env: cpu, 'rollout,actor': 0-3}", "cuda", 4),
        ("{'env,rollout,actor': all}", "cuda", 8),
        ("{'env,rollout': all, actor: cpu}", "cuda", 1),
        ("{env: cpu, 'rollout,actor': 0}", "cuda", 1),
    ],
)
def test_one_process_per_place_of_the_actor(
    placement: str, device: str, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    overrides = ("cluster.num_nodes=2", f"cluster.component_placement={placement}", f"sft.device={device}")
    assert sft._processes(load_params(QUICKSTART, overrides)) == processes
