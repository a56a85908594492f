"""``train/``: PPO or GRPO from the SFT policy; goes on from its last checkpoint if there is one."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from pi0rl.cluster.checkpoints import Checkpoints
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
from pi0rl.experiment import Experiment, differences
from pi0rl.files import replace_text
from pi0rl.params import LoggerParams, Params
from pi0rl.policy.checkpoints import load_policy, save_policy
from pi0rl.policy.policy import Policy, with_heads
from pi0rl.stages.playing import require_checkpoint
from pi0rl.tracking.metrics import MetricsWriter

# In a training folder: what the run was begun from. Only a run that was begun from the same is resumed.
ORIGIN = "origin.json"


def run(experiment: Experiment) -> None:
    """Train, or go on training."""
    params, folder = experiment.params, experiment.stage_dir("train")
    experiment_exam(params).planned()  # refuses unknown suites and missing init states now, not when training is over
    _say_what_validates(params)
    _say_what_has_nothing_to_do(experiment)
    sft_policy = experiment.stage_dir("sft") / "policy"
    require_checkpoint(sft_policy, "sft")
    origin = origin_of_run(params, sft_policy)
    finished, checkpoints, start = folder / "policy", folder / "checkpoints", folder / "start"
    if reason := reason_to_begin_anew(folder, origin):
        _say(f"{folder}: {reason}; it is thrown away and training begins anew")
        shutil.rmtree(folder)
    if not start.is_dir():
        policy = load_policy(sft_policy)
        _require_horizon(params, policy)
        begun = with_heads(policy, critic_config(params), noise_config(params), params.seed)
        _say_which_heads_are_left_out(policy, begun)
        save_policy(begun, start)
        replace_text(folder / ORIGIN, json.dumps(origin, indent=1) + "\n")
    if not finished.is_dir():
        trained = _run_loop(experiment, start)
        Checkpoints(checkpoints, start, params.runner.keep_last).keep_best(folder / "best", _say)
        trained.rename(finished)
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


def _say(line: str) -> None:
    print(f"train: {line}", file=sys.stderr)


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
    _say(f"validated from {states}, {also}")


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
            _say(f"{key}: nothing to do; {reason}")


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


def origin_of_run(params: Params, policy: Path) -> dict[str, Any]:
    """All that decides a training run: its params and the policy it starts from.

    Where it runs is left out: a run whose node is lost goes on at another placement, equal up to rounding from there.
    So are where it is logged, how many checkpoints are kept, and, unless the learning rate depends on it, its length.
    """
    sections = {"seed", "suites", "env", "rollout", "actor", "openpi", "algorithm", "runner"}
    tree = params.model_dump(mode="json", include=sections)
    optim = params.actor.optim
    free = {"logger", "keep_last"}
    if optim.lr_scheduler == "constant" or optim.total_training_steps is not None:
        free.add("max_epochs")
    tree["runner"] = {key: value for key, value in tree["runner"].items() if key not in free}
    return tree | {"policy": json.loads((policy / "config.json").read_text())}


def reason_to_begin_anew(folder: Path, origin: dict[str, Any]) -> str | None:
    """Why what is in ``folder`` cannot be gone on with; None where it can, or where there is nothing."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    if (folder / "policy").is_dir() and not (folder / "checkpoints").is_dir():
        return "the run there is finished"
    try:
        began = json.loads((folder / ORIGIN).read_text())
        changed = differences(began, origin)
    except (OSError, ValueError, AttributeError):
        return f"the run there does not say what it was begun from ({ORIGIN})"
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return f"the run there was begun with other params ({', '.join(changed[:3])}{more})" if changed else None
