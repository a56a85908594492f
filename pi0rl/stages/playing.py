"""What the stages that play episodes share: players in a Ray session of their own, and checkpoints that are there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ray.exceptions import RayTaskError

from pi0rl.cluster.iterations import EVALUATION_STREAM
from pi0rl.cluster.placement import resolve_placement
from pi0rl.cluster.players import Players, PlayersConfig, open_players, rollout_maker
from pi0rl.cluster.policies import start_policies
from pi0rl.cluster.preflight import playing_needs, preflight
from pi0rl.cluster.reservation import Reservation
from pi0rl.cluster.rollout_worker import NoiseKey
from pi0rl.cluster.session import gpus_per_node, ray_session
from pi0rl.cluster.setup import players_config
from pi0rl.errors import UserError, WorkerFailed
from pi0rl.evaluation.evaluator import Play
from pi0rl.libero.plan import Episode
from pi0rl.libero.slots import EpisodeResult
from pi0rl.params import ClusterParams, Params


@contextmanager
def evaluation_players(params: Params, checkpoint: Path, room: Reservation | None = None) -> Iterator[Players]:
    """Players for evaluation in ``room``, or in a Ray session of their own."""
    config = players_config(params, params.env.eval)
    if room is not None:
        yield Players(config, room, start_policies(room, rollout_maker(config, checkpoint)).rollouts)
        return
    with players(params.cluster, config, checkpoint) as opened:
        yield opened


@contextmanager
def players(cluster: ClusterParams, config: PlayersConfig, checkpoint: Path) -> Iterator[Players]:
    """Players in a Ray session of their own."""
    preflight(playing_needs(cluster, config.workers, config.slots, config.slot.camera_size, Path.cwd()))
    with ray_session(cluster, config.workers):
        placement = resolve_placement(cluster, gpus_per_node())
        with open_players(config, placement, checkpoint) as opened:
            yield opened


@contextmanager
def open_play(cluster: ClusterParams, config: PlayersConfig, checkpoint: Path) -> Iterator[Play]:
    """What :func:`pi0rl.evaluation.evaluator.examine` plays with."""
    with players(cluster, config, checkpoint) as opened:

        def play(
            rows: Sequence[Episode],
            seed: int,
            record: frozenset[int],
            on_results: Callable[[Sequence[EpisodeResult]], None],
        ) -> None:
            try:
                opened.play(rows, NoiseKey(seed, EVALUATION_STREAM, 0), "eval", record, on_results)
            except RayTaskError as error:
                print(error, file=sys.stderr)  # where it happened; the journal and the table hold the reason alone
                raise WorkerFailed(f"a worker failed ({error.cause!r})") from error

        yield play


def require_checkpoint(policy: Path, stage: str) -> None:
    if not (policy / "config.json").is_file():
        raise UserError(f"{policy}: no such checkpoint; run `pi0rl {stage}` first")
