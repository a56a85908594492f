"""``demos/``: successful episodes of the scripted expert on every task of the suites."""

from __future__ import annotations

from pi0rl.experiment import Experiment
from pi0rl.sft.collection import Collection, collect


def run(experiment: Experiment) -> None:
    """Collect them."""
    params = experiment.params
    collection = Collection(
        suites=params.suites,
        episodes_per_task=params.demos.episodes_per_task,
        init_state_ids=params.demos.init_state_ids,
        seed=params.demos.seed,
        camera_size=params.env.camera_size,
        render_profile=params.env.render_profile,
        settle_steps=params.env.settle_steps,
        scene_seed=params.env.seed,
        action_noise=params.demos.action_noise,
    )
    collect(collection, experiment.stage_dir("demos"), params.demos.workers)
