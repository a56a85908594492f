"""How many points fit a machine, and that no two hold the same GPU."""

from __future__ import annotations

import threading

import pytest
from projects import ROOT

from flows.room import Gpus, Machine, gpus_of, points_that_fit
from pi0rl.errors import UserError
from pi0rl.experiment import Experiment, open_experiment

BIG = Machine(cores=16, memory=256.0, gpus=tuple("01234567"))


@pytest.mark.parametrize(
    ("placement", "machine", "expected"),
    [
        ("{env: cpu, rollout: cpu, actor: cpu}", BIG, 8),  # two workers each
        ("{env: cpu, rollout: cpu, actor: cpu}", Machine(16, 6.0, ()), 3),  # 1.8 GiB each
        ("{env: cpu, rollout: cpu, actor: cpu}", Machine(1, 1.0, ()), 1),
        ("{env: cpu, rollout: 0, actor: 0-1}", BIG, 4),
        ("{env: all, rollout: all, actor: all}", BIG, 1),
    ],
)
def test_points_have_cores_memory_and_gpus_of_their_own(
    placement: str, machine: Machine, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert points_that_fit([_point(placement, monkeypatch)], machine) == expected


def test_a_running_cluster_is_left_to_one_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = _point("{env: all, rollout: all, actor: all}", monkeypatch, "cluster.address=auto")
    assert (points_that_fit([point], BIG), gpus_of(point, BIG)) == (1, 0)


def test_a_gpu_that_is_not_there_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"component_placement.actor: 0-3 asked for, this cluster has GPUs 0-1"):
        gpus_of(_point("{env: cpu, rollout: 0, actor: 0-3}", monkeypatch), Machine(8, 64.0, ("0", "1")))


def test_gpus_are_handed_on() -> None:
    gpus = Gpus(("4", "5", "6"))
    third: list[dict[str, str]] = []

    def wait_for_two() -> None:
        with gpus.take(2) as variables:
            third.append(variables)

    with gpus.take(1) as first:
        with gpus.take(1) as second:
            assert (first, second) == ({"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "5"})
            waiting = threading.Thread(target=wait_for_two)
            waiting.start()
            waiting.join(timeout=0.2)
            assert third == []
        waiting.join(timeout=60)
    assert third == [{"CUDA_VISIBLE_DEVICES": "5,6"}]
    with gpus.take(0) as none, gpus.take(3) as everything:
        assert none == everything == {}


def _point(placement: str, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Experiment:
    monkeypatch.chdir(ROOT)
    return open_experiment("quickstart", (f"cluster.component_placement={placement}", *overrides), "runs/point")
