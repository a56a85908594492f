"""One Ray session: started (or joined) for a stage, gone with it, whatever way the stage ends."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pi0rl.cluster.placement import resolve_placement
from pi0rl.cluster.preflight import refuse_silent_address
from pi0rl.cluster.vitals import Vitals
from pi0rl.errors import UserError
from pi0rl.params import ClusterParams
from pi0rl.processes import Interrupted

# Ray reads these when it is imported: no usage reports, no lower priority for workers than for their driver, and no GPU
# variables changed for actors that asked for none.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")
# Of several workers that fail for one reason, the first is reported by us; Ray need not print the others.
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
import torch
from ray._private import ray_constants

# A part of Ray that does not come up in time on a busy machine does so the next time.
START_ATTEMPTS = 3
# Ray's processes on this machine end this long after their head has gone (60 by default); it would not come back.
LOST_SECONDS = 20
_LOST_VARIABLE = "RAY_gcs_rpc_server_reconnect_timeout_s"
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what CUDA needs for deterministic matrix products
    # every worker sees all GPUs of its node and takes the one that the placement names
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
}


@dataclass(frozen=True)
class Node:
    """A machine of the Ray session: Ray's name for it, its address, its GPUs and cores."""

    identity: str
    address: str
    gpus: int
    cores: float


@contextmanager
def ray_session(cluster: ClusterParams, cpus: int, logical_gpus: int | None = None) -> Iterator[None]:
    """Ray with room for ``cpus`` env workers: a local one on loopback, or the running one at ``cluster.address``.

    A local one has this machine's GPUs, or ``logical_gpus`` that are only counted.

    Raises:
        UserError: ``cluster.address`` does not answer, it has fewer nodes than ``cluster.num_nodes``, Ray did not start
            or died; without an address, before Ray starts, a placement that this machine does not have.
    """
    if not cluster.address:
        refuse_foreign_placement(cluster, logical_gpus)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    options = {"logging_level": logging.ERROR, "log_to_driver": True, "runtime_env": {"env_vars": WORKER_ENVIRONMENT}}
    try:
        if cluster.address:
            _join(cluster.address, options)
        else:
            _start_local(cpus, options | {"num_gpus": logical_gpus})
    except SystemExit as exit:  # what ray.init makes of a SIGTERM from its beginning on
        raise Interrupted(signal.SIGTERM) from exit
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)
    try:
        nodes = len(cluster_nodes())
        if nodes < cluster.num_nodes:
            raise UserError(
                f"cluster.num_nodes is {cluster.num_nodes} but Ray has {nodes}; run `ray start --address ...` on the "
                "others and set cluster.address"
            )
        with Vitals():
            yield
    finally:
        ray.shutdown()


def refuse_foreign_placement(cluster: ClusterParams, logical_gpus: int | None = None) -> None:
    """Raises UserError where ``cluster`` asks for GPUs or nodes beyond this machine; it says what would fit."""
    if cluster.num_nodes > 1:
        raise UserError(
            f"cluster.num_nodes is {cluster.num_nodes}, and without cluster.address there is this machine alone; run "
            "`ray start --head` here and `ray start --address ...` on the others, then set cluster.address"
        )
    resolve_placement(cluster, (torch.cuda.device_count() if logical_gpus is None else logical_gpus,))


def _join(address: str, options: dict[str, Any]) -> None:
    refuse_silent_address(address)
    try:
        ray.init(address=address, **options)
    except ConnectionError as error:
        raise UserError(
            f"cluster.address {address}: no Ray answers there; run `ray start --head` on that node first"
        ) from error


def _start_local(cpus: int, options: dict[str, Any]) -> None:
    # Ray turns 127.0.0.1 into an address that others can reach, unless it believes that there are no others.
    reachable, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    os.environ[_LOST_VARIABLE] = str(LOST_SECONDS)
    reason = ""
    try:
        for attempt in range(START_ATTEMPTS):
            try:
                ray.init(
                    address="local", num_cpus=cpus, include_dashboard=False, _node_ip_address="127.0.0.1", **options
                )
                return
            except Exception as error:  # Ray raises nothing more specific when a part of it does not come up in time
                ray.shutdown()
                reason = (str(error).strip() or repr(error)).splitlines()[0]
                print(f"Ray did not start ({reason}); attempt {attempt + 1} of {START_ATTEMPTS}", file=sys.stderr)
        raise UserError(
            f"Ray did not start in {START_ATTEMPTS} attempts ({reason}); expected a free core, and room in /tmp and "
            "/dev/shm: look with `pi0rl doctor`, end what else runs here, and run the same command again"
        )
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = reachable
        del os.environ[_LOST_VARIABLE]


def cluster_nodes() -> tuple[Node, ...]:
    """The living nodes, in the order in which placements number them: this one, then the others by address."""
    own = ray.get_runtime_context().get_node_id()
    nodes = [
        Node(
            identity=node["NodeID"],
            address=node["NodeManagerAddress"],
            gpus=int(node["Resources"].get("GPU", 0)),
            cores=float(node["Resources"].get("CPU", 0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return tuple(sorted(nodes, key=lambda node: (node.identity != own, node.address, node.identity)))


def gpus_per_node() -> tuple[int, ...]:
    """GPUs of every node of the running session."""
    return tuple(node.gpus for node in cluster_nodes())
