"""The stages of an experiment, one function each, from files to files: demos (or fetch), sft, train, evaluate, report.

The CLI calls them, ``dvc.yaml`` names the CLI commands, the Prefect flow runs those DVC stages. What a stage leaves in
its folder is decided by params and seed alone, but for ``timing.*``, which DVC ignores.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch

from pi0rl.cluster.loop import EVALUATION_STREAM, VALIDATION_STREAM, Iteration
from pi0rl.cluster.loop import train as run_loop
from pi0rl.cluster.placement import resolve_placement
from pi0rl.cluster.players import Players
from pi0rl.cluster.rollout_worker import NoiseKey
from pi0rl.cluster.session import available_gpus, ray_session
from pi0rl.cluster.setup import critic_config, loop_config, noise_config, players_config
from pi0rl.errors import UserError
from pi0rl.evaluation.statistics import require_complete
from pi0rl.evaluation.table import episode_table, write_episode_table
from pi0rl.experiment import Experiment
from pi0rl.files import replace_directory, replace_text
from pi0rl.libero.plan import Episode, Split, evaluation_plan
from pi0rl.libero.slots import EpisodeResult
from pi0rl.libero.suites import suite_tasks
from pi0rl.libero.video import write_video
from pi0rl.params import Params
from pi0rl.policy.checkpoints import load_policy, save_policy
from pi0rl.policy.config import TINY
from pi0rl.policy.policy import Policy, create_policy, with_heads
from pi0rl.policy.processing import mean_std, tiny_processing
from pi0rl.progress import Progress
from pi0rl.report.page import write_report
from pi0rl.sft.collection import Collection, collect
from pi0rl.sft.demonstrations import load
from pi0rl.sft.imitation import imitate
from pi0rl.tracking.metrics import MetricsWriter
from pi0rl.tracking.publish import publish

# In a training folder: what the run was begun from. Only a run that was begun from the same is resumed.
ORIGIN = "origin.txt"


def demos(experiment: Experiment) -> None:
    """``demos/``: successful episodes of the scripted expert on every task of the suites."""
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


def fetch(experiment: Experiment) -> None:
    """``sft/policy``: an existing SFT checkpoint instead of demonstrations and imitation."""
    fetch_params = experiment.params.fetch
    if fetch_params is None:
        raise UserError("fetch: the params name no checkpoint; set fetch.checkpoint to a folder or a hub id")
    local = Path(fetch_params.checkpoint).is_dir()
    source = fetch_params.checkpoint if local else f"{fetch_params.checkpoint}@{fetch_params.revision}"
    policy = load_policy(source)
    with replace_directory(experiment.stage_dir("sft")) as folder:
        save_policy(policy, folder / "policy")


def sft(experiment: Experiment) -> None:
    """``sft/``: the policy imitation makes, and its curve; stops at ``sft.target_success`` where that is set."""
    params = experiment.params
    if params.actor.model.variant != "tiny":
        raise UserError(
            f"sft: actor.model.variant is {params.actor.model.variant}; from scratch only tiny is trained, the full "
            "model starts from an SFT checkpoint: set fetch.checkpoint"
        )
    demonstrations = load(experiment.stage_dir("demos"))
    prompts = tuple(task.language for suite in params.suites for task in suite_tasks(suite))
    processing = tiny_processing(TINY, mean_std(demonstrations.state), mean_std(demonstrations.actions), prompts)
    policy = create_policy(TINY, processing, params.seed)
    torch.set_num_threads(params.sft.num_threads)
    progress = Progress("sft", params.sft.steps, "step")
    rows: list[dict[str, float]] = []
    with replace_directory(experiment.stage_dir("sft")) as folder, _validation(params, policy, folder) as validate:
        for step in imitate(policy, demonstrations, params.sft, params.seed):
            row = {"step": step.step, "sft/loss": step.loss, "sft/grad_norm": step.grad_norm, "sft/lr": step.lr}
            success = validate(step.step)
            rows.append(row if success is None else row | {"sft/success_once": success})
            progress.update(
                step.step, f"loss {step.loss:.4f}" + ("" if success is None else f", success {success:.2f}")
            )
            if success is not None and params.sft.target_success and success >= params.sft.target_success:
                break
        save_policy(policy, folder / "policy")
        pd.DataFrame(rows).to_csv(folder / "metrics.csv", index=False)


@contextmanager
def _validation(params: Params, policy: Policy, folder: Path) -> Iterator[Callable[[int], float | None]]:
    """A function from a training step to the success of ``policy`` on official init states, None where not due."""
    if params.sft.target_success is None:
        yield lambda step: None
        return
    snapshot = folder / ".snapshot"
    save_policy(policy, snapshot)
    plan = _plan(params, "official", params.sft.val_episodes_per_task)
    with _players(params, snapshot) as players:

        def validate(step: int) -> float | None:
            since = step - params.sft.val_check_start
            if since < 0 or since % params.sft.val_check_interval:
                return None
            players.load({name: weight.detach() for name, weight in policy.named_weights().items()})
            results = players.play(plan, NoiseKey(params.seed, VALIDATION_STREAM, 0), "eval")
            return sum(result.success for result in results) / len(results)

        yield validate
    shutil.rmtree(snapshot)


def train(experiment: Experiment) -> None:
    """``train/``: PPO or GRPO from the SFT policy; goes on from its last checkpoint if there is one."""
    params, folder = experiment.params, experiment.stage_dir("train")
    sft_policy = experiment.stage_dir("sft") / "policy"
    _require(sft_policy, "sft")
    origin = _origin(params, sft_policy)
    finished, checkpoints, start = folder / "policy", folder / "checkpoints", folder / "start"
    if (finished.is_dir() and not checkpoints.is_dir()) or not _began_as(folder, origin):
        shutil.rmtree(folder, ignore_errors=True)  # finished, or begun from something else: from the start
    if not start.is_dir():
        policy = load_policy(sft_policy)
        _require_horizon(params, policy)
        save_policy(with_heads(policy, critic_config(params), noise_config(params), params.seed), start)
        replace_text(folder / ORIGIN, origin)
    if not finished.is_dir():
        _run_loop(experiment, start).rename(finished)
    shutil.rmtree(checkpoints)
    shutil.rmtree(start)


def _run_loop(experiment: Experiment, start: Path) -> Path:
    """The training loop with its metrics and its progress; returns the folder of the final policy."""
    params, folder = experiment.params, experiment.stage_dir("train")
    config = loop_config(params)
    with ray_session(params.cluster, params.env.train.workers), MetricsWriter(experiment) as writer:
        placement = resolve_placement(params.cluster, available_gpus())
        progress = Progress("train", config.iterations, "iteration")

        def on_resume(done: int) -> None:
            nonlocal progress
            progress = Progress("train", config.iterations, "iteration", done)
            writer.resume(done)

        def on_iteration(iteration: Iteration) -> None:
            writer.write(iteration.number, iteration.metrics, iteration.timing)
            progress.update(iteration.number + 1, _headline(iteration), always=True)

        players = players_config(params, params.env.train)
        return run_loop(config, players, placement, start, folder, on_iteration, on_resume)


def _require(policy: Path, stage: str) -> None:
    if not (policy / "config.json").is_file():
        raise UserError(f"{policy}: no such checkpoint; run `pi0rl {stage}` first")


def _require_horizon(params: Params, policy: Policy) -> None:
    chunk, horizon = params.actor.model.num_action_chunks, policy.config.action_horizon
    if chunk > horizon:
        raise UserError(f"actor.model.num_action_chunks is {chunk} but this policy predicts {horizon} actions")


def _origin(params: Params, policy: Path) -> str:
    """All that decides a training run: its params and the policy it starts from."""
    sections = {"seed", "suites", "cluster", "env", "rollout", "actor", "openpi", "algorithm", "runner"}
    return params.model_dump_json(include=sections, indent=1) + "\n" + (policy / "config.json").read_text()


def _began_as(folder: Path, origin: str) -> bool:
    return (folder / ORIGIN).is_file() and (folder / ORIGIN).read_text() == origin


def _headline(iteration: Iteration) -> str:
    metrics, timing = iteration.metrics, iteration.timing
    return (
        f"success {metrics['env/success_once']:.2f}, length {metrics['env/episode_len']:.0f}, "
        f"KL {metrics.get('actor/approx_kl', 0.0):.3f}, "
        f"explained variance {metrics.get('critic/explained_variance', 0.0):.2f}, "
        f"{timing['perf/env_steps_per_second']:.0f} env steps/s"
    )


def evaluate(experiment: Experiment) -> None:
    """``evaluate/episodes.parquet``: both policies on one fixed plan; ``evaluate/videos``: some of its episodes."""
    params = experiment.params
    plan = _plan(params, params.evaluation.split, params.evaluation.episodes_per_task)
    recorded = _recorded(plan, params)
    trained = "ppo" if params.algorithm.adv_type == "gae" else "grpo"
    tables = []
    with replace_directory(experiment.stage_dir("evaluate")) as folder:
        for name, stage in (("sft", "sft"), (trained, "train")):
            _require(experiment.stage_dir(stage) / "policy", stage)
            with _players(params, experiment.stage_dir(stage) / "policy") as players:
                results = _play(players, plan, recorded, params, name)
            videos = _write_videos(folder, name, plan, results, params.video_cfg.info_on_video)
            tables.append(episode_table(name, plan, results, videos))
        table = pd.concat(tables, ignore_index=True)
        require_complete(table, {params.evaluation.split: len(plan)})
        write_episode_table(table, folder / "episodes.parquet")


def _plan(params: Params, split: Split, episodes_per_task: int) -> tuple[Episode, ...]:
    return evaluation_plan(params.suites, split, episodes_per_task, params.env.seed)


@contextmanager
def _players(params: Params, checkpoint: Path) -> Iterator[Players]:
    """Players for evaluation in a Ray session of their own."""
    with ray_session(params.cluster, params.env.eval.workers):
        placement = resolve_placement(params.cluster, available_gpus())
        yield Players(players_config(params, params.env.eval), placement, checkpoint)


def _play(
    players: Players, plan: tuple[Episode, ...], recorded: frozenset[int], params: Params, name: str
) -> list[EpisodeResult]:
    progress = Progress(f"evaluate {name}", len(plan), "episode")
    noise = NoiseKey(params.evaluation.seed, EVALUATION_STREAM, 0)
    results = players.play(plan, noise, "eval", recorded, on_episodes=progress.update)
    progress.update(len(plan), f"{sum(result.success for result in results)}/{len(results)} successful", always=True)
    return results


def _recorded(plan: tuple[Episode, ...], params: Params) -> frozenset[int]:
    """The first episode of ``videos_per_policy`` tasks, spread over the plan."""
    if not params.video_cfg.save_video:
        return frozenset()
    firsts = [episode.index for episode in plan if episode.init_state_id == 0]
    count = min(params.evaluation.videos_per_policy, len(firsts))
    return frozenset(firsts[index * len(firsts) // count] for index in range(count))


def _write_videos(
    folder: Path, policy: str, plan: tuple[Episode, ...], results: list[EpisodeResult], info: bool
) -> dict[int, str]:
    """Write the recorded episodes; returns plan index -> path relative to the stage's folder."""
    paths = {}
    for episode, result in zip(plan, results, strict=True):
        if result.frames is not None:
            name = f"videos/{policy}_{episode.suite}_{episode.task_id}_{episode.init_state_id}.mp4"
            (folder / "videos").mkdir(exist_ok=True)
            write_video(folder / name, result, episode, info)
            paths[episode.index] = name
    return paths


def report(experiment: Experiment) -> None:
    """``reports/<experiment>/``: results.json, Markdown, one HTML page; and the experiment's MLflow run, completed."""
    write_report(experiment.run_dir, experiment.report_dir, experiment.reference)
    publish(experiment)
