"""The Prefect flow of an experiment: one task per DVC stage, in order, on Prefect's embedded server.

DVC decides what is stale; a task only runs ``dvc repro --single-item`` and watches it. ``pi0rl run`` starts this module
as a program.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.artifacts import StageProgress, show_results
from pi0rl.errors import UserError
from pi0rl.experiment import Experiment, freeze, open_experiment
from pi0rl.processes import Interrupted, raise_on_signals, run_child

ERROR = "pi0rl: error: "
BIN = Path(sys.executable).parent

Watch = Callable[[str], None]


class StageOutput:
    """Shows a stage's lines as they come and keeps back the one that says why it failed."""

    def __init__(self, prefix: str, watchers: Sequence[Watch]) -> None:
        self._prefix = prefix
        self._watchers = watchers
        self.error: str | None = None
        self.skipped = False

    def __call__(self, line: str) -> None:
        if line.startswith(ERROR):
            self.error = line.removeprefix(ERROR)
        elif line.startswith("ERROR: "):
            reason = "it failed; what it said is above" if "failed to run" in line else line.removeprefix("ERROR: ")
            self.error = self.error or reason
        elif line.endswith("didn't change, skipping"):
            self.skipped = True
        elif not line.startswith(_CHATTER) and line:
            print(f"{self._prefix}    {line}", flush=True)
            for watch in self._watchers:
                watch(line)


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


@task(cache_policy=NO_CACHE, task_run_name="{stage}", persist_result=False)
def run_stage(stage: str, address: str, root: Path, prefix: str = "", watch: Watch | None = None) -> str:
    """Bring one stage up to date; returns what happened in words. Raises UserError with the stage's own message.

    ``prefix`` begins every line; ``watch`` is called after each line of the stage, and what it raises ends the stage.
    """
    output = StageOutput(prefix, [StageProgress(stage), *([watch] if watch else [])])
    started = time.monotonic()
    code = run_child(
        [str(BIN / "dvc"), "repro", "--single-item", address],
        cwd=root,
        environment={"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONUNBUFFERED": "1", "SHELL": "/bin/sh"},
        on_line=output,
        send=os.killpg,
    )
    if code != 0:
        raise UserError(f"{stage}: {output.error or f'exit code {code}'}")
    return "unchanged" if output.skipped else f"done in {_minutes(time.monotonic() - started)}"


@flow(name="libero-experiment", flow_run_name="{name}", persist_result=False, validate_parameters=False)
def libero_experiment(name: str, overrides: tuple[str, ...] = (), output: str | None = None) -> str:
    """Run an experiment's stages; those that are up to date are skipped. Returns the report's folder."""
    experiment = open_experiment(name, tuple(overrides), output)
    freeze(experiment)
    run_stages(experiment)
    return str(experiment.report_dir)


def run_stages(experiment: Experiment, prefix: str = "", watch: Watch | None = None) -> None:
    """One task per stage, in order; ``prefix`` begins the lines that name them."""
    for number, stage in enumerate(experiment.stages, start=1):
        heading = f"{prefix}[{number}/{len(experiment.stages)}] {stage}"
        print(heading, flush=True)
        outcome = run_stage(stage, experiment.address(stage), experiment.root, prefix, watch)
        print(f"{heading}: {outcome}", flush=True)
    show_results(experiment)


def main(arguments: list[str]) -> int:
    """``python -m flows.experiment NAME``: the flow, its errors as one line."""
    (name,) = arguments
    raise_on_signals()
    try:
        print(f"report: {libero_experiment(name)}")
    except UserError as error:
        print(f"{ERROR}{error}", file=sys.stderr)
        return 2
    except Interrupted as interruption:
        return 128 + interruption.signum
    return 0


def _minutes(seconds: float) -> str:
    return f"{int(seconds // 60)} min {seconds % 60:.0f} s" if seconds >= 60 else f"{seconds:.1f} s"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
