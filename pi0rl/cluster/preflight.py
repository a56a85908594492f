"""What is looked at before Ray is started: all that would otherwise end in a silent wait or in a crash hours later."""

from __future__ import annotations

import math
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pi0rl.errors import UserError
from pi0rl.params import ClusterParams, Params

GIB = 2**30
# Ray's own processes and logs; the policy and optimiser of a checkpoint come on top.
RAY_DISK = 1 * GIB
# Ray's object store without anything of ours in it.
RAY_SHARED = 64 * 2**20
CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Needs:
    """What a stage is about to ask of this machine.

    Attributes:
        env_workers: simulator processes here; 0 where they run on other nodes.
        shared: bytes that are in Ray's object store at once.
        directory: where the run is written.
        disk: bytes that it will write there.
    """

    env_workers: int
    shared: float
    directory: Path
    disk: float


def training_needs(params: Params, start: Path, directory: Path) -> Needs:
    """Of a training below ``directory`` that begins from the policy in ``start``."""
    env, model = params.env.train, params.actor.model
    look = 2 * 3 * params.env.camera_size**2
    episodes = env.total_num_envs * params.algorithm.rollout_epoch
    played = episodes * math.ceil(env.max_episode_steps / model.num_action_chunks) * look
    places = params.cluster.component_placement
    apart = len({str(place) for names, place in places.items() if "rollout" in names or "actor" in names}) > 1
    policy = sum(path.stat().st_size for path in start.rglob("*"))
    return Needs(
        env_workers=0 if params.cluster.address else env.workers,
        shared=2 * env.total_num_envs * look + (played if apart else 0),
        directory=directory,
        # weights and two moments each, with an average also that and what was trained; one more is written before an
        # old one goes
        disk=(3 if params.actor.ema_decay is None else 5) * policy * (params.runner.keep_last + 2),
    )


def playing_needs(cluster: ClusterParams, env_workers: int, slots: int, camera_size: int, directory: Path) -> Needs:
    """Of an evaluation."""
    shared = 2 * slots * 2 * 3 * camera_size**2
    return Needs(0 if cluster.address else env_workers, shared, directory, disk=0.0)


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be; ``fatal``: the run cannot work, otherwise it will be slow."""

    message: str
    fatal: bool


def preflight(needs: Needs) -> None:
    """Print what will slow the run down, one line each.

    Raises:
        UserError: what will end it, one line each.
    """
    findings = list(examine(needs))
    for finding in findings:
        if not finding.fatal:
            print(f"warning: {finding.message}", file=sys.stderr)
    fatal = [finding.message for finding in findings if finding.fatal]
    if fatal:
        raise UserError("\n".join(fatal))


def examine(needs: Needs, shared_memory: Path = Path("/dev/shm"), temporary: Path | None = None) -> Iterator[Finding]:
    """Ports, shared memory, cores, disk.

    Args:
        needs: what is asked for.
        shared_memory: where Ray keeps what processes share.
        temporary: where Ray keeps sockets and logs; RAY_TMPDIR or /tmp if left out.
    """
    try:
        with socket.create_server(("127.0.0.1", 0)):
            pass
    except OSError as error:
        yield Finding(f"ports: no server can be opened on 127.0.0.1 ({error}); Ray needs the loopback device", True)
    if shared_memory.is_dir():
        free, wanted = shutil.disk_usage(shared_memory).free, RAY_SHARED + needs.shared
        if free < wanted:
            yield Finding(
                f"shared memory: {shared_memory} has {free / GIB:.2f} GiB free, {wanted / GIB:.2f} GiB are needed; Ray "
                "will use the disk instead, which is slow (in Docker: --shm-size=8g)",
                False,
            )
    cores = len(os.sched_getaffinity(0))
    if needs.env_workers > cores:
        yield Finding(
            f"cores: {needs.env_workers} env workers on {cores} cores; more than one per core gains nothing: lower "
            "env.train.workers and env.eval.workers",
            False,
        )
    yield from _disk(needs.directory, needs.disk, "the run's checkpoints")
    yield from _disk(temporary or Path(os.environ.get("RAY_TMPDIR", "/tmp")), RAY_DISK, "Ray's sockets and logs")


def _disk(directory: Path, wanted: float, what: str) -> Iterator[Finding]:
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < wanted:
        yield Finding(
            f"disk: {existing} has {free / GIB:.1f} GiB free, {what} need {wanted / GIB:.1f} GiB; free some", True
        )
    if not os.access(existing, os.W_OK):
        yield Finding(f"disk: {existing} cannot be written by this user; {what} go there", True)


def refuse_silent_address(address: str, seconds: float = CONNECT_SECONDS) -> None:
    """Raises UserError if nothing listens at ``host:port``: Ray itself would try for minutes without a word."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if address == "auto":
        return
    if not colon or not port.isdigit():
        raise UserError(f"cluster.address {address}: expected host:port as `ray start --head` prints it, or auto")
    try:
        with socket.create_connection((host, int(port)), seconds):
            pass
    except OSError as error:
        raise UserError(
            f"cluster.address {address}: nobody answers within {seconds:.0f} s ({error}); run `ray start --head` "
            "there, and check firewall and address"
        ) from error
