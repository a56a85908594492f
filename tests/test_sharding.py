"""Weights spread over two actors (FSDP2): the same update as one makes, and the same checkpoints."""

from __future__ import annotations

import multiprocessing
import socket
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_workers import (
    CHUNK,
    CHUNKS,
    _process,  # noqa: F401 (an autouse fixture: workers change their process)
    played,
    quickstart,
    start_actor,
    start_rollout,
)
from tiny_policies import PREFIX_CRITIC, make_policy
from torch.distributed.tensor import DTensor

from pi0rl.cluster.actor_worker import AVERAGE, OPTIMIZER, TRAINED, ActorWorker
from pi0rl.cluster.setup import loop_config, sampler_config
from pi0rl.params import Params
from pi0rl.policy.checkpoints import save_policy
from pi0rl.rl.trajectories import Trajectory

STEPS = CHUNKS * CHUNK
# three micro batches per minibatch: one actor computes one in vain
PARAMS = (
    "actor.micro_batch_size=4",
    "algorithm.update_epoch=2",
    "algorithm.kl_beta=0.1",
    "actor.optim.critic_warmup_iterations=0",
    "openpi.train_expert_only=false",
)


@pytest.mark.parametrize(
    ("override", "files"),
    [
        ("actor.ema_decay=0.5", ("policy/model.safetensors", AVERAGE, OPTIMIZER, TRAINED)),
        ("actor.fsdp_config.gradient_checkpointing=true", (OPTIMIZER, "policy/model.safetensors")),
    ],
    ids=["averaged", "recomputed"],
)
def test_two_that_share_the_weights_learn_as_one_does(tmp_path: Path, override: str, files: tuple[str, ...]) -> None:
    save_policy(make_policy(PREFIX_CRITIC), tmp_path / "start")
    params = quickstart(*PARAMS, override)
    rollout, alone = start_rollout(params, tmp_path / "start"), start_actor(params, tmp_path / "start")
    parts, expected = [], []
    for iteration in range(2):
        parts.append(played(params, rollout, iteration))
        expected.append(alone.update(iteration, STEPS, parts[-1]))
        rollout.load(alone.weights())
        folder = tmp_path / f"alone {iteration}"
        folder.mkdir()
        alone.save(folder)

    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    pair = [context.Process(target=learn, args=(rank, address, params, parts, tmp_path, answers)) for rank in range(2)]
    for process in pair:
        process.start()
    told = [answers.get(timeout=600) for _ in pair]
    for process in pair:
        process.join(timeout=60)
    for share, metrics in told:
        assert 0.4 < share < 0.6
        for one, other in zip(metrics, [*expected, expected[1]], strict=True):
            assert one == pytest.approx(other, rel=1e-3, abs=1e-4)
    for name, tolerance in (("shared 0", 1e-6), ("shared 1", 1e-5), ("resumed", 1e-5)):
        theirs, ours = (tmp_path / name, tmp_path / f"alone {'0' if name == 'shared 0' else '1'}")
        for file in files:
            one, other = load_file(theirs / file), load_file(ours / file)
            assert one.keys() == other.keys()
            for key in one:
                torch.testing.assert_close(one[key], other[key], rtol=1e-3, atol=tolerance)
    first, second = (load_file(tmp_path / f"handed over by {rank}.safetensors") for rank in range(2))
    saved = load_file(tmp_path / "shared 1" / files[-1])
    assert all(torch.equal(first[name], second[name]) and torch.equal(first[name], saved[name]) for name in first)
    alone.resume(tmp_path / "shared 0")
    assert alone.update(1, STEPS, parts[1]) == pytest.approx(expected[1], rel=1e-3, abs=1e-4)


def learn(rank: int, address: str, params: Params, parts: list[list[Trajectory]], folder: Path, answers: Any) -> None:
    """What one of the two does: two updates, and the second one again from the checkpoint that one alone has made."""
    config = loop_config(params)
    settings = sampler_config(params), None, config.update, config.train_expert_only, config.gradient_checkpointing
    actor = ActorWorker(folder / "start", *settings, 1, "cpu", sharded=True, ema_decay=config.ema_decay)
    actor.start()
    actor.join(address, rank, 2)
    spread = [parameter for parameter in actor._trainable.values() if isinstance(parameter, DTensor)]
    share = sum(each.to_local().numel() for each in spread) / sum(parameter.numel() for parameter in spread)

    def save(name: str) -> None:
        (folder / name).mkdir(exist_ok=True)
        actor.save(folder / name)

    metrics = []
    for iteration in range(2):
        metrics.append(actor.update(iteration, STEPS, parts[iteration]))
        save(f"shared {iteration}")
    save_file(actor.weights(), folder / f"handed over by {rank}.safetensors")
    actor.resume(folder / "alone 0")
    metrics.append(actor.update(1, STEPS, parts[1]))
    save("resumed")
    answers.put((share, metrics))
