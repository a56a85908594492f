"""Placements: as published, as refused, and as Ray reserves them on logical GPUs and simulated nodes."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from pi0rl.cluster import preflight, session
from pi0rl.cluster.placement import Placement, Seat, fitting, resolve_placement
from pi0rl.cluster.preflight import Needs, examine, refuse_silent_address
from pi0rl.errors import UserError
from pi0rl.params import ClusterParams

ALL = tuple(range(8))


def placed(placement: dict[str, object], gpus_per_node: tuple[int, ...] = (8,)) -> Placement:
    cluster = ClusterParams.model_validate(
        {"num_nodes": len(gpus_per_node), "component_placement": placement},
    )
    return resolve_placement(cluster, gpus_per_node)


@pytest.mark.parametrize(
    ("placement", "env", "rollout", "actor"),
    [
        ({"env": "0-3", "rollout": "4-7", "actor": "0-7"}, (0, 1, 2, 3), (4, 5, 6, 7), ALL),
        ({"env,rollout,actor": "all"}, ALL, ALL, ALL),
        ({"env": "0-1", "rollout": "2-5", "actor": "6-7"}, (0, 1), (2, 3, 4, 5), (6, 7)),
        ({"env,rollout": "0,2-3", "actor": 7}, (0, 2, 3), (0, 2, 3), (7,)),
        ({"env": "cpu", "rollout, actor": "0"}, (), (0,), (0,)),
        ({"env,rollout,actor": "cpu"}, (), (), ()),
    ],
)
def test_published_forms(
    placement: dict[str, object], env: tuple[int, ...], rollout: tuple[int, ...], actor: tuple[int, ...]
) -> None:
    found = placed(placement)
    assert (found.env, found.rollout, found.actor) == (env, rollout, actor)


def test_gpus_are_numbered_through_the_nodes() -> None:
    found = placed({"env": "0-5", "rollout": "2-4", "actor": "7"}, (4, 4))
    assert found.seats("rollout") == (Seat(0, 2), Seat(0, 3), Seat(1, 0))
    assert [found.device(seat) for seat in found.seats("actor")] == ["cuda:3"]
    # simulators run on the nodes of their GPUs, as many for one GPU as for another
    assert [seat.node for seat in found.env_seats(12)] == [0] * 8 + [1] * 4
    assert [seat.node for seat in found.env_seats(2)] == [0, 0]


def test_components_on_cores_may_name_nodes() -> None:
    everywhere = placed({"env,rollout,actor": "cpu"}, (0, 0))
    assert [seat.node for seat in everywhere.env_seats(4)] == [0, 0, 1, 1]
    assert everywhere.seats("rollout") == everywhere.seats("actor") == (Seat(0),)
    named = placed({"env": {"node_group": "node", "placement": "1-2"}, "rollout,actor": "0"}, (1, 0, 0))
    assert [seat.node for seat in named.env_seats(3)] == [1, 1, 2]
    assert named.device(named.seats("env")[0]) == "cpu"


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ({"env": "cpu", "rolout": "cpu", "actor": "cpu"}, "rolout: unknown component.* did you mean rollout"),
        ({"env,rollout,actor": "cpu", "inference": "0"}, "inference: unknown component"),
        ({"env": "cpu", "rollout": "cpu"}, "no place for actor"),
        ({"env": "cpu", "env,rollout": "cpu", "actor": "cpu"}, "env: placed twice"),
        (
            {"env": "cpu", "rollout": "8", "actor": "cpu"},
            "GPUs 0-7; would fit: 'env,rollout,actor: all', or",
        ),
        ({"env": "cpu", "rollout": "3-1", "actor": "cpu"}, "not a placement"),
        ({"env": "cpu", "rollout": "1,1", "actor": "cpu"}, "names a GPU twice"),
        ({"env": "0-3:0-7", "rollout": "1", "actor": "cpu"}, "env.train.workers"),
        ({"env": {"node_group": "node", "placement": 1}, "rollout,actor": 0}, "cluster has node 0 alone"),
        ({"env": {"node_group": "a800", "placement": 1}, "rollout,actor": 0}, "node_group: node"),
    ],
)
def test_impossible_placements_are_refused(placement: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        placed(placement)


@pytest.mark.parametrize("gpus", [0, 1, 2, 3, 8, 9])
def test_what_is_said_to_fit_fits(gpus: int) -> None:
    for form in fitting(gpus).split(", or "):
        entries = dict(part.strip("' ").split(": ") for part in form.replace("' and '", "' with '").split("' with '"))
        missing = {"actor": "cpu"} if "actor" not in " ".join(entries) else {}
        assert placed({**entries, **missing}, (gpus,)).gpus == tuple(range(gpus))


def test_what_a_machine_lacks_is_said_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    modest = Needs(env_workers=1, shared=0.0, directory=tmp_path / "not yet", disk=0.0)
    assert list(examine(modest)) == []
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**30, 2**29, 2**20))
    greedy = Needs(env_workers=10_000, shared=2**33, directory=tmp_path, disk=2**33)
    with pytest.raises(UserError) as refusal:
        preflight.preflight(greedy)
    lines = str(refusal.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["disk", "disk"]
    assert f"{tmp_path} has 0.0 GiB free, the run's checkpoints need 8.0 GiB" in lines[0]
    warnings = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in warnings] == ["shared memory", "cores"]


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost", "ray://127.0.0.1:1"])
def test_an_address_where_nobody_answers_is_refused_at_once(address: str) -> None:
    with pytest.raises(UserError, match=r"cluster\.address"):
        refuse_silent_address(address, seconds=1.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"component_placement": {"env": "cpu", "rollout,actor": "0-3"}}, "has GPUs 0-1; would fit: 'env,rollout"),
        ({"num_nodes": 2}, "cluster.num_nodes is 2, and without cluster.address"),
    ],
)
def test_what_only_another_machine_has_is_refused_before_ray_starts(
    overrides: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(session.ray, "init", pytest.fail)
    with pytest.raises(UserError, match=message), session.ray_session(ClusterParams.model_validate(overrides), cpus=1):
        pass


@pytest.mark.parametrize("failures", [2, 3])
def test_ray_is_started_again_where_it_does_not_come_up_in_time(
    failures: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attempts = []

    def init(**options: object) -> None:
        attempts.append(options)
        if len(attempts) <= failures:
            raise TimeoutError("the node did not come up\nand much more")

    monkeypatch.setattr(session.ray, "init", init)
    if failures == 2:
        session._start_local(1, {})
    else:
        with pytest.raises(UserError, match=r"did not start in 3 attempts \(the node did not come up\); expected"):
            session._start_local(1, {})
    assert len(attempts) == 3
    assert len(capsys.readouterr().err.splitlines()) == failures
