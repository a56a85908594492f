"""``sft/``: the policy imitation makes, and its curve; stops at ``sft.target_success`` where that is set."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch

from pi0rl.cluster.loop import VALIDATION_STREAM
from pi0rl.cluster.rollout_worker import NoiseKey
from pi0rl.errors import UserError
from pi0rl.experiment import Experiment
from pi0rl.files import replace_directory
from pi0rl.libero.plan import evaluation_plan
from pi0rl.libero.suites import suite_tasks
from pi0rl.params import Params
from pi0rl.policy.checkpoints import save_policy
from pi0rl.policy.config import TINY
from pi0rl.policy.policy import Policy, create_policy
from pi0rl.policy.precision import set_precision
from pi0rl.policy.processing import mean_std, tiny_processing
from pi0rl.progress import Progress
from pi0rl.sft.demonstrations import load
from pi0rl.sft.imitation import imitate
from pi0rl.stages.playing import evaluation_players


def run(experiment: Experiment) -> None:
    """Train from scratch on ``demos/``."""
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
        set_precision(policy, params.actor.model.precision or "fp32")
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
    plan = evaluation_plan(params.suites, "official", params.sft.val_episodes_per_task, params.env.seed)
    with evaluation_players(params, snapshot) as players:

        def validate(step: int) -> float | None:
            since = step - params.sft.val_check_start
            if since < 0 or since % params.sft.val_check_interval:
                return None
            players.load({name: weight.detach() for name, weight in policy.named_weights().items()})
            results = players.play(plan, NoiseKey(params.seed, VALIDATION_STREAM, 0), "eval")
            return sum(result.success for result in results) / len(results)

        yield validate
    shutil.rmtree(snapshot)
