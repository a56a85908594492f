"""Two nodes with four logical GPUs each: everything runs where its placement says, and trains to the same."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from safetensors.torch import load_file
from tiny_policies import PREFIX_CRITIC, make_policy
from tiny_training import QUICKSTART, SMALL

from pi0rl.cluster.iterations import Iteration
from pi0rl.cluster.loop import train
from pi0rl.cluster.placement import Placement, resolve_placement
from pi0rl.cluster.reservation import Reservation
from pi0rl.cluster.session import WORKER_ENVIRONMENT, cluster_nodes, gpus_per_node
from pi0rl.cluster.setup import loop_config, players_config
from pi0rl.errors import UserError
from pi0rl.params import ClusterParams, load_params
from pi0rl.policy.checkpoints import save_policy

FORMS: tuple[dict[str, str], ...] = (
    {"env": "0-3", "rollout": "4-7", "actor": "0-7"},
    {"env,rollout,actor": "all"},
    {"env": "0-1", "rollout": "2-5", "actor": "6-7"},
)
NODE = {"num_cpus": 4, "num_gpus": 4, "object_store_memory": 2**28}
EIGHT = ("env.train.total_num_envs=8", "actor.global_batch_size=8", "actor.micro_batch_size=1")


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers do not see the tests' folder
    cluster.add_node(**NODE)
    ray.init(address=cluster.address, logging_level="ERROR", runtime_env={"env_vars": WORKER_ENVIRONMENT})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def placed(form: dict[str, str], nodes: int = 2) -> Placement:
    cluster = ClusterParams.model_validate({"num_nodes": nodes, "component_placement": form})
    return replace(resolve_placement(cluster, gpus_per_node()), accelerator="cpu")


class Somebody:
    """A process that says where it is."""

    def where(self) -> tuple[str, str | None]:
        return ray.get_runtime_context().get_node_id(), os.environ.get("CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize("form", FORMS)
def test_room_is_reserved_where_the_placement_says(two_nodes: Cluster, form: dict[str, str]) -> None:
    placement, nodes = placed(form), cluster_nodes()
    with Reservation(placement, env_workers=4) as room:
        seats = [placement.seats("rollout")[-1], placement.seats("actor")[0], *placement.env_seats(4)[::3]]
        options = [*(room.seat_options(seat) for seat in seats[:2]), room.env_options(0), room.env_options(3)]
        found = [ray.remote(Somebody).options(**each).remote() for each in options]
        places = ray.get([each.where.remote() for each in found])
    assert [node for node, _ in places] == [nodes[seat.node].identity for seat in seats]


def test_what_cannot_be_had_is_refused(two_nodes: Cluster) -> None:
    with pytest.raises(UserError, match=r"9 env workers on node 0 .* has 4 cores; expected at most 8"):
        Reservation(placed({"env,rollout,actor": "all"}), env_workers=18)
    with Reservation(placed({"env": "cpu", "rollout": "2", "actor": "0-1"}), env_workers=1):
        message = r"waited 1 s for Ray to reserve 4 GPUs and 1 cores of node 0 .* free are 5 GPUs"
        with pytest.raises(UserError, match=message):
            Reservation(placed({"env,rollout,actor": "all"}), env_workers=2, seconds=1.0)


@pytest.mark.slow
def test_every_placement_trains_to_the_same(two_nodes: Cluster, tmp_path: Path) -> None:
    params = load_params(QUICKSTART, (*SMALL, *EIGHT))
    save_policy(make_policy(PREFIX_CRITIC), tmp_path / "start")
    loop, players = loop_config(params), players_config(params, params.env.train)

    def run(placement: Placement, folder: Path) -> tuple[dict[str, torch.Tensor], list[Iteration]]:
        reports: list[Iteration] = []
        policy = train(loop, players, placement, tmp_path / "start", folder, reports.append, lambda done: None)
        return load_file(policy / "model.safetensors"), reports

    expected, alone = run(placed({"env,rollout,actor": "cpu"}), tmp_path / "cores")
    for number, form in enumerate(FORMS):
        weights, reports = run(placed(form), tmp_path / str(number))
        for one, other in zip(reports, alone, strict=True):
            assert one.metrics == pytest.approx(other.metrics, rel=1e-2, abs=1e-4)
            assert one.metrics["actor/first_ratio_error"] < 1e-3
        for name, weight in expected.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_lost_node_ends_the_run_and_it_can_be_resumed(two_nodes: Cluster, tmp_path: Path) -> None:
    third = two_nodes.add_node(**NODE)
    two_nodes.wait_for_nodes()
    params = load_params(QUICKSTART, SMALL)
    save_policy(make_policy(PREFIX_CRITIC), tmp_path / "start")
    loop, players, told = loop_config(params), players_config(params, params.env.train), list[str]()

    def run(placement: Placement, folder: Path, lose: bool) -> dict[str, torch.Tensor]:
        def on_iteration(iteration: Iteration) -> None:
            if lose and iteration.number == 0:
                two_nodes.remove_node(third, allow_graceful=False)

        start = tmp_path / "start"
        policy = train(loop, players, placement, start, folder, on_iteration, lambda done: None, told.append)
        return load_file(policy / "model.safetensors")

    # in one of its processes every run has the third node, whatever Ray's order of the nodes
    apart = placed({"env": "0", "rollout": "4", "actor": "8"}, nodes=3)
    with pytest.raises(UserError, match=r"a node of it is not there any more, Ray has 2 nodes left; .* to resume"):
        run(apart, tmp_path / "run", lose=True)
    assert len(told) == 1
    again = run(placed({"env": "cpu", "rollout": "0", "actor": "4"}), tmp_path / "run", lose=False)
    straight = run(placed({"env": "cpu", "rollout": "0", "actor": "4"}), tmp_path / "straight", lose=False)
    for name, weight in straight.items():
        assert torch.equal(again[name], weight)
