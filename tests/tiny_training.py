"""A training of a few small iterations as a process of its own, and the params that tests of trainings share.

python tests/tiny_training.py CHECKPOINT FOLDER [key=value ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

from pi0rl.cluster.iterations import Iteration
from pi0rl.cluster.loop import train
from pi0rl.cluster.placement import Placement, resolve_placement
from pi0rl.cluster.session import gpus_per_node, ray_session
from pi0rl.cluster.setup import loop_config, players_config
from pi0rl.errors import UserError
from pi0rl.params import load_params
from pi0rl.processes import raise_on_signals, stop_descendants
from pi0rl.tracking.metrics import METRICS, CsvTable

QUICKSTART = Path(__file__).parents[1] / "params" / "quickstart.yaml"
CPU = Placement((), (), ())
SMALL = (
    "env.train.total_num_envs=4",
    "env.train.max_episode_steps=16",
    "env.settle_steps=0",
    "algorithm.rollout_epoch=1",
    "actor.global_batch_size=4",
    "actor.micro_batch_size=4",
    "actor.optim.critic_warmup_iterations=0",
    "runner.max_epochs=2",
    "runner.save_interval=1",
)


def main(checkpoint: Path, folder: Path, overrides: tuple[str, ...]) -> None:
    params = load_params(QUICKSTART, (*SMALL, *overrides))
    metrics = CsvTable(folder / "metrics.csv", tuple(METRICS))
    with ray_session(params.cluster, params.env.train.workers):
        print("playing", flush=True)
        placement = resolve_placement(params.cluster, gpus_per_node())
        players = players_config(params, params.env.train)

        def on_iteration(iteration: Iteration) -> None:
            metrics.append(iteration.number, iteration.metrics)
            print(f"iteration {iteration.number}", flush=True)

        policy = train(loop_config(params), players, placement, checkpoint, folder, on_iteration, metrics.resume)
    print(f"done {policy}", flush=True)


if __name__ == "__main__":
    raise_on_signals()
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]), tuple(sys.argv[3:]))
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
    finally:
        stop_descendants()
