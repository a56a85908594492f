"""``sft/``: the policy imitation makes, and its curve; stops at ``sft.target_success`` where that is set."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from pi0rl.cluster.iterations import VALIDATION_STREAM
from pi0rl.cluster.placement import Component, resolve_placement
from pi0rl.cluster.reservation import Reservation
from pi0rl.cluster.rollout_worker import NoiseKey
from pi0rl.cluster.session import gpus_per_node, ray_session
from pi0rl.errors import UserError
from pi0rl.experiment import Experiment
from pi0rl.files import replace_directory
from pi0rl.libero.plan import evaluation_plan
from pi0rl.libero.suites import suite_tasks
from pi0rl.params import Params
from pi0rl.policy.checkpoints import layout_of, load_policy
from pi0rl.policy.config import TINY
from pi0rl.policy.description import check_variant
from pi0rl.policy.lora import LoraConfig, with_lora
from pi0rl.policy.policy import Policy, create_policy, with_heads
from pi0rl.policy.processing import Normalisation, Processing, tiny_processing
from pi0rl.policy.sources import ORIGIN, Source, origin_of, print_if_moving, resolve
from pi0rl.progress import Progress
from pi0rl.rl.update import Team
from pi0rl.sft.demonstrations import Demonstrations, load, normalisation, read_card, split
from pi0rl.sft.imitation import Imitation, action_windows
from pi0rl.sft.training import SharedTraining, Training
from pi0rl.stages.playing import evaluation_players


def run(experiment: Experiment) -> None:
    """Train on ``demos/``, from scratch or from a checkpoint, in as many processes as the actor has places."""
    params, sft, demos = experiment.params, experiment.params.sft, experiment.stage_dir("demos")
    target = experiment.stage_dir("sft")
    unfinished = target.with_name(f".{target.name}.training.partial")
    card = read_card(demos)
    start, origin = _start(params)
    kind = _kind(params, card, origin)
    with (
        _begun(params, demos, start) as (training, room),
        replace_directory(target) as folder,
        _playing(params, training, room, folder) as played,
    ):
        rows = training.go_on(unfinished, kind)
        if not rows and unfinished.is_file():
            print(
                f"sft: {unfinished} was saved with other params, demonstrations, checkpoint or number of processes, or "
                "by another version; starting anew",
                flush=True,
            )
        progress = Progress("sft", sft.steps, "step", training.done)
        while training.done < sft.steps and not _reached(params, rows):
            step = training.step()
            row = {"step": step.step, "sft/loss": step.loss, "sft/grad_norm": step.grad_norm, "sft/lr": step.lr}
            if sft.val_demos_per_task and _due(params, step.step):
                row["sft/val_loss"] = training.validation_loss()
            row |= played(step.step)
            rows.append(row)
            success = row.get("sft/success_once")
            progress.update(
                step.step, f"loss {step.loss:.4f}" + ("" if success is None else f", success {success:.2f}")
            )
            if sft.save_interval is not None and step.step % sft.save_interval == 0:
                training.save_state(unfinished, kind, rows)
        training.save(folder / "policy", params.actor.model.precision or ("fp32" if sft.checkpoint is None else None))
        if origin is not None:
            (folder / "policy" / ORIGIN).write_text(json.dumps(origin, indent=1) + "\n")
        pd.DataFrame(rows).to_csv(folder / "metrics.csv", index=False)
    unfinished.unlink(missing_ok=True)


def _seed(params: Params) -> int:
    assert params.sft.seed is not None  # the experiment's where the file names none
    return params.sft.seed


def _start(params: Params) -> tuple[Source | None, dict[str, Any] | None]:
    """The checkpoint to start from, found once for all processes, and what is recorded of it; None from scratch."""
    if params.sft.checkpoint is None:
        return None, None
    source = resolve(params.sft.checkpoint, default_branch=True)
    if source.kind == "hub":
        print_if_moving(source, f"sft.checkpoint: {source.location}@{source.commit}")
    return source, origin_of(source, layout_of(source.directory)) | {"then": "sft"}


@contextmanager
def _begun(
    params: Params, demos: Path, start: Source | None
) -> Iterator[tuple[Training | SharedTraining, Reservation | None]]:
    """The training at its start; where several processes share it, with the room in which they do."""
    if _processes(params) == 1:
        yield _begin(params, demos, start, params.sft.device, None), None
        return
    plays = params.sft.target_success is not None
    with ray_session(params.cluster, params.env.eval.workers):
        placement = resolve_placement(params.cluster, gpus_per_node())
        components: tuple[Component, ...] = ("env", "rollout", "actor") if plays else ("actor",)
        with Reservation(placement, params.env.eval.workers, components) as room:
            yield SharedTraining(partial(_begin, params, demos, start), room), room


def _processes(params: Params) -> int:
    """One per place of the actor, where these are what ``sft.device`` says (GPUs, or nodes' cores); else one."""
    cluster = params.cluster
    placed = {part.strip(): value for key, value in cluster.component_placement.items() for part in key.split(",")}
    actor = placed.get("actor", "cpu")
    on_cores = actor == "cpu" or isinstance(actor, dict)
    if on_cores != (params.sft.device == "cpu"):
        return 1
    gpus = 0 if on_cores else torch.cuda.device_count()
    alone = cluster.model_copy(update={"component_placement": {"env,rollout": "cpu", "actor": actor}})
    return len(resolve_placement(alone, (gpus,) * cluster.num_nodes).seats("actor"))


def _begin(params: Params, demos: Path, start: Source | None, device: str, team: Team | None) -> Training:
    sft = params.sft
    demonstrations, held_out = split(load(demos), sft.demos_per_task, sft.val_demos_per_task)
    if start is None:
        policy = _from_scratch(params, demonstrations).to(device)
    else:
        policy = _from_checkpoint(params, start, demonstrations).to(device)
    policy = with_lora(policy, None if sft.lora_rank is None else LoraConfig(sft.lora_rank, _seed(params)))
    policy.trainable_parameters(sft.train_expert_only)
    torch.set_num_threads(sft.num_threads)
    return Training(policy, Imitation(policy, demonstrations, sft, _seed(params), team), held_out)


def _from_scratch(params: Params, demonstrations: Demonstrations) -> Policy:
    if params.actor.model.variant != "tiny":
        raise UserError(
            f"sft: actor.model.variant is {params.actor.model.variant}; from scratch only tiny is trained, the full "
            "model starts from a checkpoint: set sft.checkpoint, or fetch.checkpoint to do without imitation"
        )
    prompts = tuple(task.language for suite in params.suites for task in suite_tasks(suite))
    statistics, mean_std = demonstrations.card["norm_stats"], Normalisation("mean_std", (), ())
    state_norm, action_norm = (_with(mean_std, statistics[name]) for name in ("state", "actions"))
    return create_policy(TINY, tiny_processing(TINY, state_norm, action_norm, prompts), _seed(params))


def _from_checkpoint(params: Params, start: Source, demonstrations: Demonstrations) -> Policy:
    """The checkpoint without heads and with these demonstrations' statistics; it need not have any of its own."""
    # Another node fetches its own. Only the hub's client can tell a whole download from a folder that is half there.
    whole = start.kind != "hub" and start.directory.is_dir()
    here = start if whole else resolve(start.location, start.commit)
    assets = None if params.sft.assets is None else Path(params.sft.assets)
    policy = load_policy(here.directory, assets, statistics=False)
    check_variant(policy.config, params.actor.model.variant, start.location)
    policy = with_heads(policy, None, None, _seed(params))
    policy.processing = _renormalised(policy.processing, demonstrations, policy.config.action_horizon)
    return policy


def _renormalised(processing: Processing, demonstrations: Demonstrations, horizon: int) -> Processing:
    """The same processing with the demonstrations' statistics: of what the network predicts, relative or not."""
    statistics = demonstrations.card["norm_stats"]
    of_actions = statistics["actions"]
    if processing.delta_actions:
        windows = action_windows(demonstrations, horizon)
        relative = processing.relative(windows, demonstrations.state).reshape(-1, windows.shape[-1])
        of_actions = normalisation(relative)
    return replace(
        processing,
        state_norm=_with(processing.state_norm, statistics["state"]),
        action_norm=_with(processing.action_norm, of_actions),
    )


def _with(norm: Normalisation, statistics: dict[str, list[float]]) -> Normalisation:
    first, second = ("mean", "std") if norm.method == "mean_std" else ("q01", "q99")
    return replace(norm, first=tuple(statistics[first]), second=tuple(statistics[second]))


def _due(params: Params, step: int) -> bool:
    """Whether something is measured after this step."""
    since = step - params.sft.val_check_start
    return since >= 0 and since % params.sft.val_check_interval == 0


def _reached(params: Params, rows: list[dict[str, float]]) -> bool:
    success, target = rows[-1].get("sft/success_once") if rows else None, params.sft.target_success
    return success is not None and target is not None and success >= target


@contextmanager
def _playing(
    params: Params, training: Training | SharedTraining, room: Reservation | None, folder: Path
) -> Iterator[Callable[[int], dict[str, float]]]:
    """A function from a training step to the policy's success on official init states; empty where not due."""
    if params.sft.target_success is None:
        yield lambda step: {}
        return
    snapshot = folder / ".snapshot"
    training.save(snapshot)
    plan = evaluation_plan(params.suites, "official", params.sft.val_episodes_per_task, params.env.seed)
    with evaluation_players(params, snapshot, room) as players:

        def play(step: int) -> dict[str, float]:
            if not _due(params, step):
                return {}
            players.load(training.weights(), step)
            results = players.play(plan, NoiseKey(_seed(params), VALIDATION_STREAM, 0), "eval", version=step)
            return {"sft/success_once": sum(result.success for result in results) / len(results)}

        yield play
    shutil.rmtree(snapshot)


def _kind(params: Params, card: dict[str, Any], origin: dict[str, Any] | None) -> str:
    """What a saved state has to agree with to be gone on from."""
    described: list[Any] = [
        params.sft.model_dump(mode="json", exclude={"save_interval"}),
        params.actor.model.model_dump(mode="json"),
    ]
    described += [] if origin is None else [origin["sha256"]]
    text = json.dumps([*described, _processes(params), params.suites, card["fingerprint"]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
