"""A training of a few small iterations as a process of its own: python tests/tiny_training.py CHECKPOINT FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

from pi0rl.cluster.loop import Iteration, train
from pi0rl.cluster.placement import resolve_placement
from pi0rl.cluster.session import gpus_per_node, ray_session
from pi0rl.cluster.setup import loop_config, players_config
from pi0rl.errors import UserError
from pi0rl.params import load_params
from pi0rl.processes import raise_on_signals, stop_descendants

QUICKSTART = Path(__file__).parents[1] / "params" / "quickstart.yaml"
SMALL = (
    "env.train.total_num_envs=4",
    "env.train.max_episode_steps=24",
    "env.settle_steps=0",
    "algorithm.rollout_epoch=1",
    "actor.global_batch_size=4",
    "actor.micro_batch_size=4",
    "actor.optim.critic_warmup_iterations=0",
    "runner.max_epochs=4",
    "runner.save_interval=1",
)


def main(checkpoint: Path, folder: Path) -> None:
    params = load_params(QUICKSTART, SMALL)
    with ray_session(params.cluster, params.env.train.workers):
        print("playing", flush=True)
        placement = resolve_placement(params.cluster, gpus_per_node())
        players = players_config(params, params.env.train)

        def on_iteration(iteration: Iteration) -> None:
            print(f"iteration {iteration.number}", flush=True)

        policy = train(loop_config(params), players, placement, checkpoint, folder, on_iteration, lambda done: None)
    print(f"done {policy}", flush=True)


if __name__ == "__main__":
    raise_on_signals()
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except UserError as error:
        sys.exit(f"error: {error}")
    finally:
        stop_descendants()
