"""The command line: thin commands over the stages, the flow and the checks.

Exit codes: 0 done, 1 a check failed, 2 something the user can mend (one line says what), 130 and 143 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from pi0rl import __version__
from pi0rl.errors import UserError
from pi0rl.experiment import Experiment, open_experiment, resolve
from pi0rl.files import replace_text
from pi0rl.processes import Interrupted, die_with_parent, raise_on_signals, run_child, stop_descendants

STAGES = {
    "resolve": "write the params with all defaults to the run folder",
    "demos": "collect demonstrations with the scripted expert",
    "fetch": "start from an existing checkpoint instead of demos and sft",
    "sft": "train a policy by imitation",
    "train": "improve it by reinforcement learning (goes on where it was interrupted)",
    "evaluate": "play the fixed evaluation plan with both policies",
    "report": "write tables, curves and videos",
}

EXAMPLES = """examples:
  pi0rl run quickstart                            the whole experiment; what is up to date is skipped
  pi0rl run quickstart --output runs/again        the same once more, into another folder
  pi0rl run quickstart --set seed=1 --set runner.max_epochs=30
  pi0rl run runs/again                            go on with a frozen experiment
  pi0rl run libero_10_ppo_openpi                  a full-size experiment of params/
  pi0rl train quickstart                          one stage, up to date or not
  pi0rl status quickstart                         which stages are up to date
  pi0rl doctor                                    check this machine
"""

# Where an OSError is about the user's disk rather than our bug
_DISK_ERRORS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EACCES: "change its permissions",
    errno.EPERM: "change its permissions",
    errno.EROFS: "choose a writable place",
    errno.ENOTDIR: "move the file that is in the way",
    errno.EEXIST: "move the file that is in the way",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    options = _parser().parse_args(arguments)
    raise_on_signals()
    if "DVC_STAGE" in os.environ:
        die_with_parent()  # a killed dvc must not leave the stage running
    try:
        return _COMMANDS[options.command](options) or 0
    except UserError as error:
        return _fail(str(error))
    except Interrupted as interruption:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 128 + interruption.signum
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        return _fail(f"cannot write {error.filename or 'a file'}: {error.strerror}; {_DISK_ERRORS[error.errno]}")
    finally:
        stop_descendants()


def _fail(message: str) -> int:
    print(f"pi0rl: error: {message}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pi0rl",
        description="Reinforcement learning for pi0 policies on the LIBERO benchmark.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pi0rl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    descriptions = {"run": "the whole experiment, as a Prefect flow over the DVC stages", **STAGES}
    descriptions["status"] = "which stages are up to date, and why others are not"
    for name, description in descriptions.items():
        command = commands.add_parser(name, help=description, description=description.capitalize() + ".")
        command.add_argument("experiment", help="a name in params/ (quickstart), a params file, or a folder of runs/")
        command.add_argument(
            "--set",
            dest="overrides",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="override a param, e.g. --set seed=1; may be repeated",
        )
        command.add_argument("--output", metavar="DIR", help="run folder below runs/; the report goes to reports/")
    commands.add_parser("doctor", help="check this machine: versions, rendering, simulator, disk, memory")
    return parser


def _opened(options: argparse.Namespace) -> Experiment:
    return open_experiment(options.experiment, tuple(options.overrides), options.output)


def _stage(options: argparse.Namespace) -> None:
    """One stage's function, timed; DVC is told of it, so that it counts as done however it was started."""
    experiment = _opened(options)
    resolve(experiment)
    if options.command == "resolve":
        return
    if options.command not in experiment.stages:
        raise UserError(
            f"{experiment.name} has no stage {options.command}; its stages are {', '.join(experiment.stages)} "
            "(an experiment with fetch.checkpoint starts from it, without demos and sft)"
        )
    from pi0rl import stages  # heavy imports only for those who run a stage

    started, clock = datetime.now(UTC), time.monotonic()
    getattr(stages, options.command)(experiment)
    folder = experiment.stage_dir("sft" if options.command == "fetch" else options.command)
    if folder.is_dir():
        timing = {"started": started.isoformat(timespec="seconds"), "seconds": round(time.monotonic() - clock, 1)}
        replace_text(folder / "timing.json", json.dumps(timing) + "\n")
    if "DVC_STAGE" not in os.environ:
        dvc = str(Path(sys.executable).parent / "dvc")
        done = [experiment.address(stage) for stage in experiment.stages if stage in ("resolve", options.command)]
        command = [dvc, "commit", "--quiet", "--force", *done]
        if run_child(command, cwd=experiment.root, environment={}, on_line=None, send=os.killpg):
            raise UserError(f"{options.command} is done, but DVC could not record it; what it said is above")


def _run(options: argparse.Namespace) -> int:
    """The flow in a process of its own, so that even a killed Prefect server or flow leaves nothing behind."""
    experiment = _opened(options)  # mistakes in params show before Prefect's start
    command = [sys.executable, "-m", "flows.experiment", experiment.reference]
    environment = {
        "PREFECT_HOME": str(experiment.root / ".prefect"),
        "PREFECT_LOGGING_LEVEL": "CRITICAL",  # the stages speak for themselves
        "DO_NOT_TRACK": "1",
    }
    code = run_child(command, cwd=experiment.root, environment=environment, on_line=None, send=os.kill)
    if code in (130, 143):
        raise Interrupted(code - 128)
    return code


def _status(options: argparse.Namespace) -> int:
    from pi0rl.status import print_status

    return print_status(_opened(options))


def _doctor(options: argparse.Namespace) -> int:
    from pi0rl.doctor import examine

    return examine()


_COMMANDS = {**dict.fromkeys(STAGES, _stage), "run": _run, "status": _status, "doctor": _doctor}

if __name__ == "__main__":
    sys.exit(main())
