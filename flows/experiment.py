"""The Prefect flow of an experiment: one task per DVC stage, in order, on Prefect's embedded server.

DVC decides what is stale; a task only runs ``dvc repro --single-item`` and watches it. ``pi0rl run`` starts this module
as a program.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from prefect import Task, flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun

from flows.artifacts import StageProgress, show_results
from flows.program import ERROR, exit_code
from pi0rl.errors import UserError
from pi0rl.experiment import Experiment, freeze, open_experiment
from pi0rl.processes import run_child
from pi0rl.tracking.publish import catch_up

BIN = Path(sys.executable).parent

_TOLD_TO_STOP = (128 + signal.SIGINT, 128 + signal.SIGTERM)

Watch = Callable[[str], None]


class StageOutput:
    """Shows a stage's lines as they come and keeps back the one that says why it failed."""

    def __init__(self, prefix: str, watchers: Sequence[Watch]) -> None:
        self._prefix = prefix
        self._watchers = watchers
        self.error: str | None = None
        self.crashed = True  # until it says why it ends
        self.skipped = False

    def __call__(self, line: str) -> None:
        if line.startswith(ERROR):
            self.error, self.crashed = line.removeprefix(ERROR), False
        elif line.startswith("ERROR: ") and "failed to run" in line:
            self.error = self.error or (_KILLED if _BY_SIGKILL.search(line) else "it failed; what it said is above")
        elif line.startswith("ERROR: "):  # of DVC
            self.error, self.crashed = self.error or line.removeprefix("ERROR: "), False
        elif line.endswith("didn't change, skipping"):
            self.skipped = True
        elif not line.startswith(_CHATTER) and line:
            print(f"{self._prefix}    {line}", flush=True)
            for watch in self._watchers:
                watch(line)


# How DVC ends its line on a stage that was killed, itself or below its shell
_BY_SIGKILL = re.compile(r"exited with (-9|137)$")
_KILLED = "killed, by hand or because memory ran out"

# What DVC says around the stage's own lines
_CHATTER = (
    "Running stage",
    "> ",
    "Updating lock file",
    "Generating lock file",
    "Use `dvc push`",
    "Data and pipelines",
    "To track the changes",
    "\tgit add",
    "To enable auto staging",
    "\tdvc config",
)


class StageCrashed(UserError):
    """A stage that ended without saying why: killed, out of memory, a bug. Run once more, it goes on where it was."""

    def __init__(self, message: str, prefix: str = "") -> None:
        super().__init__(message)
        self.prefix = prefix


def _crashed(_task: Task[..., str], _run: TaskRun, state: State[str]) -> bool:
    """Whether to try again, asked while a try is left: a mistake of the user would only be the same mistake."""
    error = state.result(raise_on_failure=False)
    if isinstance(error, StageCrashed):
        print(f"{error.prefix}{error}; once more", flush=True)
    return isinstance(error, StageCrashed)


@task(
    cache_policy=NO_CACHE,
    task_run_name="{stage}",
    persist_result=False,
    retries=1,
    retry_delay_seconds=5,
    retry_condition_fn=_crashed,
)
def run_stage(
    stage: str,
    address: str,
    root: Path,
    prefix: str = "",
    watch: Watch | None = None,
    variables: Mapping[str, str] | None = None,
) -> str:
    """Bring one stage up to date; returns what happened in words. Raises UserError with the stage's own message.

    A stage that was killed or crashed is run once more (StageCrashed); one that was told to stop is not.
    ``prefix`` begins every line; ``watch`` is called after each line of the stage, and what it raises ends the stage;
    ``variables`` are laid over the environment.
    """
    output = StageOutput(prefix, [StageProgress(stage), *([watch] if watch else [])])
    started = time.monotonic()
    code = run_child(
        # a point whose checkpoint DVC is hashing holds the lock for longer than DVC waits by itself
        [str(BIN / "dvc"), "--wait-for-lock", "repro", "--single-item", address],
        cwd=root,
        environment={
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONUNBUFFERED": "1",
            "SHELL": "/bin/sh",
            **(variables or {}),
        },
        on_line=output,
        send=os.killpg,
    )
    if code in _TOLD_TO_STOP:
        raise UserError(f"{stage}: stopped")
    if code != 0 and output.crashed:
        reason = output.error or (_KILLED if code == 137 else f"exit code {code}")
        raise StageCrashed(f"{stage}: {reason}", prefix)
    if code != 0:
        raise UserError(f"{stage}: {output.error}")
    return "unchanged" if output.skipped else f"done in {_minutes(time.monotonic() - started)}"


@flow(name="libero-experiment", flow_run_name="{name}", persist_result=False, validate_parameters=False)
def libero_experiment(name: str, overrides: tuple[str, ...] = (), output: str | None = None) -> str:
    """Run an experiment's stages; those that are up to date are skipped. Returns the report's folder."""
    experiment = open_experiment(name, tuple(overrides), output)
    freeze(experiment)
    run_stages(experiment)
    return str(experiment.report_dir)


def run_stages(
    experiment: Experiment,
    prefix: str = "",
    watch: Watch | None = None,
    variables: Mapping[str, str] | None = None,
) -> None:
    """One task per stage, in order, see :func:`run_stage`; ``prefix`` begins the lines that name them."""
    for number, stage in enumerate(experiment.stages, start=1):
        heading = f"{prefix}[{number}/{len(experiment.stages)}] {stage}"
        print(heading, flush=True)
        outcome = run_stage(stage, experiment.address(stage), experiment.root, prefix, watch, variables)
        print(f"{heading}: {outcome}", flush=True)
    catch_up(experiment)
    show_results(experiment)


def main(arguments: list[str]) -> int:
    """``python -m flows.experiment NAME``: the flow, its errors as one line."""
    (name,) = arguments
    return exit_code(lambda: print(f"report: {libero_experiment(name)}"))


def _minutes(seconds: float) -> str:
    return f"{int(seconds // 60)} min {seconds % 60:.0f} s" if seconds >= 60 else f"{seconds:.1f} s"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
