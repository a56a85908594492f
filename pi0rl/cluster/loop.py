"""The training loop: iteration after iteration, and checkpoints; killed anywhere, it resumes to the same bytes.

SIGTERM and Ctrl-C leave a checkpoint. One that arrives while episodes are played ends them, and the weights are saved
as they are. One that arrives while weights change waits for the end of the iteration, for half of the grace time.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pi0rl.cluster.actor_worker import ActorWorker
from pi0rl.cluster.checkpoints import Checkpoint, Checkpoints
from pi0rl.cluster.iterations import Iteration, LoopConfig, Run
from pi0rl.cluster.placement import Placement
from pi0rl.cluster.players import Players, PlayersConfig, rollout_maker
from pi0rl.cluster.policies import Learner, MakeActor, start_policies
from pi0rl.cluster.reservation import Reservation
from pi0rl.cluster.waiting import first_line
from pi0rl.errors import UserError, WorkerFailed
from pi0rl.processes import GRACE_SECONDS, signals_postponed
from pi0rl.rl.config import UpdateConfig
from pi0rl.rl.guards import GuardState, validated

# Without a checkpoint in between; the run can be resumed even then.
MAX_FAILURES = 3


def _to_stderr(line: str) -> None:
    print(f"train: {line}", file=sys.stderr)


def train(
    config: LoopConfig,
    players_config: PlayersConfig,
    placement: Placement,
    start: Path,
    directory: Path,
    on_iteration: Callable[[Iteration], None],
    on_resume: Callable[[int], None],
    notice: Callable[[str], None] = _to_stderr,
) -> Path:
    """Run ``config.iterations`` iterations from the policy in ``start``; returns the folder of the final policy.

    Checkpoints live in ``directory/checkpoints``; if there is one that can be trusted, the run goes on from it, and
    ``on_resume`` is told how many iterations are already done. ``notice`` is told of checkpoints that are refused.

    A dead env worker is replaced on the spot. When a process with a policy dies, or none answers any more, everything
    is started again from the last checkpoint.

    Raises:
        UserError: training collapsed once more than ``max_rollbacks`` times.
        WorkerFailed: workers failed ``MAX_FAILURES`` times without reaching another checkpoint.
    """
    _refuse_idle_actors(config.update, len(placement.seats("actor")))
    checkpoints = Checkpoints(directory / "checkpoints", start, config.keep_last)
    make_policies = rollout_maker(players_config, start), _actor_maker(config, players_config, start)
    failures: Counter[int] = Counter()
    while True:
        checkpoint = checkpoints.latest(notice)
        try:
            with Reservation(placement, players_config.workers) as room:
                on_resume(checkpoint.iterations_done)
                policies = start_policies(room, *make_policies)
                learner = Learner(policies, averages=config.ema_decay is not None)
                run = Run(config, checkpoints, learner, Players(players_config, room, policies.rollouts))
                return _go_on(run, config, checkpoints, checkpoint, on_iteration, notice)
        except WorkerFailed as failure:
            failures[checkpoint.iterations_done] += 1
            count = failures[checkpoint.iterations_done]
            if count == MAX_FAILURES:
                raise WorkerFailed(f"{failure} ({count} failures without a checkpoint in between)") from failure
            notice(f"{failure}; starting again after {checkpoint.iterations_done} iterations")


def _go_on(
    run: Run,
    config: LoopConfig,
    checkpoints: Checkpoints,
    checkpoint: Checkpoint,
    on_iteration: Callable[[Iteration], None],
    notice: Callable[[str], None],
) -> Path:
    """All iterations after ``checkpoint``; returns the folder of the final policy."""
    done, guard = checkpoint.iterations_done, checkpoint.guard
    if done > config.iterations:
        raise UserError(
            f"runner.max_epochs={config.iterations}: {checkpoint.directory} has {done} iterations already; set at "
            "least as many, or remove the training's folder to begin anew"
        )
    checkpoints.prune(done, guard)
    if done > 0:
        run.go_on_from(checkpoint)
    if done == 0 and config.validation_plan:
        guard = validated(guard, 0, run.validate(0)[0])
    saved, whole = done, True  # whole: the actor has the weights of exactly ``done`` iterations
    try:
        for number in range(done, config.iterations):
            watch = run.play(number)
            with signals_postponed(GRACE_SECONDS / 2):
                whole = False
                iteration, guard, going_on = run.learn(number, guard, watch)
                on_iteration(iteration)
                if not going_on:
                    raise UserError(_end(iteration, guard, checkpoints.best(guard, number)))
                done = number + 1
                if iteration.events or done % config.save_interval == 0 or done == config.iterations:
                    checkpoints.write(run.save, done, guard)
                    saved = done
                whole = True
    except KeyboardInterrupt:
        if whole and saved < done:
            _save_stopped(run, checkpoints, done, guard, notice)
        elif not whole:
            notice(f"stopped within iteration {number}; a resumed run goes on after {saved} iterations")
        raise
    if config.iterations == 0:
        raise UserError("runner.max_epochs: nothing was trained; expected at least 1")
    if config.final == "best":
        return checkpoints.best(guard, config.iterations).policy
    return checkpoints.latest(notice).policy


def _save_stopped(
    run: Run, checkpoints: Checkpoints, done: int, guard: GuardState, notice: Callable[[str], None]
) -> None:
    """A checkpoint of what an interruption would lose; where it cannot be had in time, a line that says why."""
    try:
        checkpoints.write_stopped(partial(run.save, seconds=GRACE_SECONDS / 4), done, guard)
    except Exception as error:  # whatever it is, the interruption goes on
        notice(f"stopped after {done} iterations; the last ones were not saved: {first_line(error)}")
    else:
        notice(f"stopped after {done} iterations, all of them are saved")


def _refuse_idle_actors(update: UpdateConfig, actors: int) -> None:
    """Raises UserError where a minibatch has fewer micro batches than there are actors to share them."""
    if update.global_batch_size < actors * update.micro_batch_size:
        raise UserError(
            f"actor.micro_batch_size={update.micro_batch_size}: a minibatch of actor.global_batch_size="
            f"{update.global_batch_size} has too few of them for the {actors} actors of cluster.component_placement; "
            f"lower it to {max(1, update.global_batch_size // actors)} or place fewer actors"
        )


def _end(iteration: Iteration, guard: GuardState, best: Checkpoint) -> str:
    return (
        f"training collapsed in iteration {iteration.number} ({iteration.events[0]}) after {guard.rollbacks} rollbacks "
        f"(algorithm.max_rollbacks); its best policy, of {best.iterations_done} iterations, is {best.policy}; lower "
        "actor.optim.lr or algorithm.target_kl and train again"
    )


def _actor_maker(config: LoopConfig, players: PlayersConfig, start: Path) -> MakeActor:
    """What makes the actor worker of a device."""
    return partial(
        ActorWorker,
        start,
        players.sampler,
        players.lora,
        config.update,
        config.train_expert_only,
        config.gradient_checkpointing,
        config.num_threads,
        compiled=players.compiled,
        sharded=config.sharded,
        offload=config.offload,
        ema_decay=config.ema_decay,
    )
