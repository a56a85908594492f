"""``train/``: PPO or GRPO from the SFT policy; goes on from its last checkpoint if there is one."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from pi0rl.cluster.iterations import Iteration
from pi0rl.cluster.loop import train as run_loop
from pi0rl.cluster.placement import resolve_placement
from pi0rl.cluster.preflight import preflight, training_needs
from pi0rl.cluster.session import gpus_per_node, ray_session
from pi0rl.cluster.setup import (
    critic_config,
    loop_config,
    noise_config,
    players_config,
    validated_states_judged,
    validation_plan,
)
from pi0rl.errors import UserError
from pi0rl.evaluation.evaluator import experiment_exam
from pi0rl.experiment import Experiment
from pi0rl.files import replace_text
from pi0rl.params import LoggerParams, Params
from pi0rl.policy.checkpoints import load_policy, save_policy
from pi0rl.policy.policy import Policy, with_heads
from pi0rl.stages.playing import require_checkpoint
from pi0rl.tracking.metrics import MetricsWriter

# In a training folder: what the run was begun from. Only a run that was begun from the same is resumed.
ORIGIN = "origin.txt"


def run(experiment: Experiment) -> None:
    """Train, or go on training."""
    params, folder = experiment.params, experiment.stage_dir("train")
    experiment_exam(params).planned()  # refuses unknown suites and missing init states now, not when training is over
    _say_what_validates(params)
    _say_what_has_nothing_to_do(experiment)
    sft_policy = experiment.stage_dir("sft") / "policy"
    require_checkpoint(sft_policy, "sft")
    origin = _origin(params, sft_policy)
    finished, checkpoints, start = folder / "policy", folder / "checkpoints", folder / "start"
    if (finished.is_dir() and not checkpoints.is_dir()) or not _began_as(folder, origin):
        shutil.rmtree(folder, ignore_errors=True)  # finished, or begun from something else: from the start
    if not start.is_dir():
        policy = load_policy(sft_policy)
        _require_horizon(params, policy)
        begun = with_heads(policy, critic_config(params), noise_config(params), params.seed)
        _say_which_heads_are_left_out(policy, begun)
        save_policy(begun, start)
        replace_text(folder / ORIGIN, origin)
    if not finished.is_dir():
        _run_loop(experiment, start).rename(finished)
    shutil.rmtree(checkpoints)
    shutil.rmtree(start)


def _run_loop(experiment: Experiment, start: Path) -> Path:
    """The training loop with its metrics; returns the folder of the final policy."""
    params, folder = experiment.params, experiment.stage_dir("train")
    config = loop_config(params)
    preflight(training_needs(params, start, folder))
    with ray_session(params.cluster, params.env.train.workers), MetricsWriter(experiment) as writer:
        placement = resolve_placement(params.cluster, gpus_per_node())

        def on_iteration(iteration: Iteration) -> None:
            writer.write(iteration.number, iteration.metrics, iteration.timing, iteration.events)

        players = players_config(params, params.env.train)
        return run_loop(config, players, placement, start, folder, on_iteration, writer.resume)


def _say_what_validates(params: Params) -> None:
    """One line on the states of validation; an error where the final policy would be chosen by what judges it."""
    plan, judged = validation_plan(params), validated_states_judged(params)
    if not plan:
        return
    count = params.runner.val_episodes_per_task
    states = f"the last {count} held-out init states of every task"
    if judged and params.runner.final_policy == "best":
        raise UserError(
            f"runner.final_policy best would be chosen on {states}, and {judged} of these {len(plan)} judge it in the "
            "evaluation; lower evaluation.episodes_per_task or runner.val_episodes_per_task, or set final_policy: last"
        )
    also = f"{judged} of these {len(plan)} in the final evaluation too" if judged else "none in the final evaluation"
    print(f"train: validated from {states}, {also}", file=sys.stderr)


def _say_what_has_nothing_to_do(experiment: Experiment) -> None:
    """One line per key of RLinf's that is set and changes nothing here."""
    params, default = experiment.params, LoggerParams()
    logger, videos = params.runner.logger, params.video_cfg
    renamed, moved = logger.experiment_name != default.experiment_name, logger.log_path != default.log_path
    for key, is_set, reason in (
        ("rollout.enable_offload", params.rollout.enable_offload, "the rollout's weights are the learner's, none idle"),
        ("env.enable_offload", params.env.enable_offload, "simulators hold no GPU memory that others could use"),
        ("runner.logger.log_path", moved, f"all files are in runs/{experiment.name}"),
        ("runner.logger.experiment_name", renamed, f"it is logged as {experiment.name}"),
        ("video_cfg.video_base_dir", videos.video_base_dir is not None, "videos lie beside the table of episodes"),
    ):
        if is_set:
            print(f"train: {key}: nothing to do; {reason}", file=sys.stderr)


def _say_which_heads_are_left_out(checkpoint: Policy, begun: Policy) -> None:
    """One line per trained head that the params have no use for."""
    for name, head, kept in (
        ("value", checkpoint.value_head, begun.value_head),
        ("noise", checkpoint.noise_head, begun.noise_head),
    ):
        if head is not None and head is not kept:
            print(f"train: the checkpoint's {name} head is not what the params ask for; left out", file=sys.stderr)


def _require_horizon(params: Params, policy: Policy) -> None:
    chunk, horizon = params.actor.model.num_action_chunks, policy.config.action_horizon
    if chunk > horizon:
        raise UserError(f"actor.model.num_action_chunks is {chunk} but this policy predicts {horizon} actions")


def _origin(params: Params, policy: Path) -> str:
    """All that decides a training run: its params and the policy it starts from.

    Where it runs is left out: a run whose node is lost goes on at another placement, equal up to rounding from there.
    """
    sections = {"seed", "suites", "env", "rollout", "actor", "openpi", "algorithm", "runner"}
    return params.model_dump_json(include=sections, indent=1) + "\n" + (policy / "config.json").read_text()


def _began_as(folder: Path, origin: str) -> bool:
    return (folder / ORIGIN).is_file() and (folder / ORIGIN).read_text() == origin
