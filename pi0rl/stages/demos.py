"""``demos/``: successful episodes on every task of the suites: of the scripted expert, or of a data set."""

from __future__ import annotations

from pi0rl.experiment import Experiment
from pi0rl.params import Params
from pi0rl.sft.collection import Collection, collect
from pi0rl.sft.importing import Import, import_demonstrations


def run(experiment: Experiment) -> None:
    """Collect them, or take them over."""
    params, folder = experiment.params, experiment.stage_dir("demos")
    if params.demos.dataset is not None:
        import_demonstrations(_import(params), folder)
        return
    collection = Collection(
        suites=params.suites,
        episodes_per_task=params.demos.episodes_per_task,
        init_state_ids=params.demos.init_state_ids,
        seed=params.demos.seed,
        camera_size=params.env.camera_size,
        render_profile=params.env.render_profile,
        image_stride=params.demos.image_stride,
        settle_steps=params.env.settle_steps,
        scene_seed=params.env.seed,
        action_noise=params.demos.action_noise,
    )
    collect(collection, folder, params.demos.workers)


def _import(params: Params) -> Import:
    assert params.demos.dataset is not None
    return Import(
        source=params.demos.dataset.source,
        fps=params.demos.dataset.fps,
        suites=params.suites,
        episodes_per_task=params.demos.episodes_per_task,
        camera_size=params.env.camera_size,
    )
