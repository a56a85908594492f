"""The command line: thin commands over the stages, the flow and the checks.

Exit codes: 0 done, 1 a check failed, 2 something the user can mend (one line says what), 130 and 143 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from pi0rl import __version__
from pi0rl.errors import UserError
from pi0rl.experiment import Experiment, decided_by, freeze, open_experiment, project_root, resolve
from pi0rl.invocations import recorded
from pi0rl.params import different_suites
from pi0rl.processes import Interrupted, die_with_parent, raise_on_signals, run_child, stop_descendants
from pi0rl.sweeps import Point

STAGES = {
    "resolve": "write the params with all defaults to the run folder",
    "demos": "collect demonstrations with the scripted expert, or take over a data set (demos.dataset)",
    "fetch": "start from an existing checkpoint instead of demos and sft",
    "sft": "train a policy by imitation",
    "train": "improve the policy by reinforcement learning (goes on where it was interrupted)",
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
  pi0rl evaluate --checkpoint org/name@main --suites libero_10 --protocol openpi
  pi0rl sweep quickstart --list                   the points of a sweep; without --list they run
  pi0rl status quickstart                         which stages are up to date
  pi0rl train libero_10_ppo_openpi --dry-run      one short iteration with a shrunk network: is all wired?
  pi0rl plan libero_10_ppo_openpi                 the memory it will take, and what would make it fit
  pi0rl doctor                                    check this machine
"""

_CHECKPOINTS = "a folder, org/name@revision, models:/name/version or dvc:REPOSITORY#PATH"

# Where an OSError is about the user's disk rather than our bug
_DISK_ERRORS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
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
    except KeyboardInterrupt as interruption:  # Ray's waiting makes a plain one of our Interrupted
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 128 + getattr(interruption, "signum", signal.SIGINT)
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
        command = commands.add_parser(name, help=description, description=_sentence(description))
        command.add_argument(
            "experiment",
            nargs="?" if name == "evaluate" else None,  # or --checkpoint
            help="a name in params/ (quickstart), a params file, or a folder of runs/",
        )
        _add_overrides(command)
        command.add_argument("--output", metavar="DIR", help="run folder below runs/; the report goes to reports/")
        if name == "evaluate":
            _add_checkpoint_options(command)
        if name == "train":
            command.add_argument(
                "--dry-run", action="store_true", help="one short iteration with the network shrunk; writes nothing"
            )
    description = "every point of a sweep in params/sweeps/, then their comparison"
    sweep = commands.add_parser("sweep", help=description, description=_sentence(description))
    sweep.add_argument("sweep", help="a name in params/sweeps/ (quickstart)")
    instead = sweep.add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="only list the points")
    instead.add_argument("--compare", action="store_true", help="only compare the points that have a report by now")
    _add_overrides(sweep)
    description = "checkpoints that `pi0rl evaluate --checkpoint` examined, side by side and paired by episode"
    compare = commands.add_parser("compare", help=description, description=_sentence(description))
    compare.add_argument("base", type=Path, help="the folder of the evaluation that the others are compared with")
    compare.add_argument("others", type=Path, nargs="+", help="folders of other evaluations")
    _restore_parser(commands)
    description = "run an MLflow run's experiment again and compare it to the bit"
    command = commands.add_parser("reproduce", help=description, description=_sentence(description))
    command.add_argument("run", help="id or name of the MLflow run")
    _checkpoint_parser(commands)
    _dataset_parser(commands)
    description = "the memory a training will take per device, and what would make it fit"
    plan = commands.add_parser("plan", help=description, description=_sentence(description))
    plan.add_argument("experiment", help="a name in params/ (libero_10_ppo_openpi) or a params file")
    _add_overrides(plan)
    plan.add_argument("--gpus", type=int, help="of the machine (default: this one's, or as many as the params name)")
    plan.add_argument("--gpu-memory", type=float, metavar="GIB", help="of each (default: this machine's, or 80)")
    plan.add_argument("--memory", type=float, metavar="GIB", help="main memory (default: this machine's, or 1000)")
    description = "check this machine: versions, rendering, simulator, disk, memory"
    commands.add_parser("doctor", help=description, description=_sentence(description))
    return parser


def _sentence(description: str) -> str:
    return f"{description[0].upper()}{description[1:]}."  # capitalize() would write dvc and mlflow


def _add_overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a param, e.g. --set seed=1; may be repeated",
    )


def _add_checkpoint_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group(
        "instead of an experiment, any checkpoint",
        "openpi's, LeRobot's, RLinf's or our own; --set then changes the protocol, e.g. --set episodes_per_task=10, or "
        "--set instructions=permuted to see whether the policy listens",
    )
    group.add_argument("--checkpoint", metavar="PATH_OR_HUB", help=_CHECKPOINTS)
    group.add_argument("--suites", metavar="A,B", default="libero_spatial,libero_object,libero_goal,libero_10")
    group.add_argument("--protocol", default="default", help="default, openpi, lerobot or rlinf")
    group.add_argument("--split", choices=("official", "held_out", "both"), default="official", help="of init states")
    group.add_argument("--seeds", metavar="0,1", default="0", help="of the policy's noise; each plays the whole plan")
    group.add_argument("--workers", type=_positive, help="simulator processes (default: one per core, at most 16)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text}: expected a positive whole number")
    return int(text)


def _evaluate(options: argparse.Namespace) -> None:
    if options.checkpoint is None:
        if options.experiment is None:
            raise UserError("evaluate: expected an experiment (quickstart) or --checkpoint PATH_OR_HUB")
        return _stage(options)
    if options.experiment is not None:
        raise UserError(f"evaluate: {options.experiment} and --checkpoint exclude one another; leave one of them out")
    from pi0rl.stages import evaluate_checkpoint as standalone

    standalone.run(
        standalone.Request(
            checkpoint=options.checkpoint,
            suites=_suites(standalone.words(options.suites)),
            protocol=options.protocol,
            overrides=tuple(options.overrides),
            split=options.split,
            seeds=standalone.whole_numbers(options.seeds, "--seeds"),
            output=None if options.output is None else Path(options.output),
            workers=options.workers or standalone.default_workers(),
        )
    )


def _suites(names: tuple[str, ...]) -> tuple[str, ...]:
    try:
        return different_suites(names)
    except ValueError as error:
        raise UserError(f"--suites {','.join(names)}: {error}") from error


def _compare(options: argparse.Namespace) -> None:
    from pi0rl.stages import compare

    compare.run([options.base, *options.others])


def _restore_parser(commands: argparse._SubParsersAction) -> None:
    description = "bring back the checkpoints that an MLflow run recorded, from DVC's cache or its remote"
    command = commands.add_parser("restore", help=description, description=_sentence(description))
    command.add_argument("run", help="id or name of the MLflow run")
    command.add_argument("--output", metavar="DIR", help="the folder to make (default: runs/restored/<run id>)")


def _checkpoint_parser(commands: argparse._SubParsersAction) -> None:
    description = "look at a checkpoint, convert it (pi0rl, openpi, LeRobot; RLinf's is read), or bring one back"
    command = commands.add_parser("checkpoint", help=description, description=_sentence(description))
    actions = command.add_subparsers(dest="action", required=True)
    inspect = actions.add_parser("inspect", help="layout, variant, sizes, statistics, heads, tokenizer, origin, digest")
    convert = actions.add_parser("convert", help="write it in another layout")
    _restore_parser(actions)
    for action in (inspect, convert):
        action.add_argument("source", help=_CHECKPOINTS)
        action.add_argument("--assets", type=Path, help="folder with norm_stats.json and tokenizer, where it has none")
    convert.add_argument("target", type=Path, help="a new folder")
    convert.add_argument("--to", required=True, choices=("pi0rl", "openpi", "lerobot"))
    convert.add_argument("--verify", action="store_true", help="read it back and compare on a fixed batch")


def _checkpoint(options: argparse.Namespace) -> None:
    if options.action == "restore":
        return _restore(options)
    if options.action == "inspect":
        from pi0rl.policy.inspection import inspect

        lines = inspect(options.source, options.assets)
    else:
        from pi0rl.policy.conversion import convert

        lines = convert(options.source, options.target, options.to, options.verify, options.assets)
    for line in lines:
        print(line, flush=True)


def _dataset_parser(commands: argparse._SubParsersAction) -> None:
    description = "look at a set of demonstrations (pi0rl's, LeRobot's, LIBERO's HDF5), or write it as a LeRobotDataset"
    command = commands.add_parser("dataset", help=description, description=_sentence(description))
    actions = command.add_subparsers(dest="action", required=True)
    inspect = actions.add_parser("inspect", help="format, tasks, episodes, steps, image size")
    inspect.add_argument("source", help="a folder, or a LeRobotDataset's hub id org/name@revision")
    inspect.add_argument("--fps", type=int, default=20, help="what a LeRobotDataset has to say of itself (default: 20)")
    export = actions.add_parser("export", help="write demonstrations as a LeRobotDataset v3")
    export.add_argument("source", type=Path, help="what the stage demos has left, e.g. runs/quickstart/demos")
    export.add_argument("target", type=Path, help="a new folder")


def _dataset(options: argparse.Namespace) -> None:
    if options.action == "export":
        from pi0rl.sft.lerobot_export import export

        export(options.source, options.target)
        print(f"written to {options.target}; to share it: hf upload --repo-type dataset ORG/NAME {options.target}")
        return
    from pi0rl.sft.importing import inspect

    for line in inspect(options.source, options.fps):
        print(line)


def _opened(options: argparse.Namespace) -> Experiment:
    return open_experiment(options.experiment, tuple(options.overrides), options.output)


def _freeze(experiment: Experiment) -> None:
    """Write params and stages to the experiment's folder; says so where other params lay there."""
    if changes := freeze(experiment):
        print(f"{experiment.reference}: params changed ({', '.join(changes)}); what depends on them runs again")


def _stage(options: argparse.Namespace) -> None:
    """One stage's function, timed; DVC is told of it, so that it counts as done however it was started."""
    if options.command == "train" and options.dry_run:
        from pi0rl.stages.dry_run import dry_run

        return dry_run(options.experiment, _opened(options).params)
    experiment = _opened(options)
    if options.command not in (*experiment.stages, "resolve"):
        raise UserError(
            f"{experiment.name} has no stage {options.command}; its stages are {', '.join(experiment.stages)} "
            "(an experiment with fetch.checkpoint starts from it, without demos and sft)"
        )
    _freeze(experiment)
    resolve(experiment)
    if options.command == "resolve":
        return
    stage = import_module(f"pi0rl.stages.{options.command}")  # heavy imports only for those who run a stage
    if options.command == "report":
        stage.run(experiment)
    else:
        folder = experiment.stage_dir("sft" if options.command == "fetch" else options.command)
        made_from = [name for name in experiment.stages if name not in ("resolve", "report")]
        made_from = made_from[: made_from.index(options.command) + 1]
        with recorded(folder, decided_by(experiment, made_from), experiment.root):
            stage.run(experiment)
    if "DVC_STAGE" not in os.environ:
        dvc = str(Path(sys.executable).parent / "dvc")
        done = [experiment.address(stage) for stage in experiment.stages if stage in ("resolve", options.command)]
        command = [dvc, "--wait-for-lock", "commit", "--quiet", "--force", *done]
        if run_child(command, cwd=experiment.root, environment={}, on_line=None, send=os.killpg):
            again = f"dvc commit --force {' '.join(done)}"  # --quiet hides errors too
            raise UserError(f"{options.command} is done, but DVC could not record it; to see why, run: {again}")


def _run(options: argparse.Namespace) -> int:
    experiment = _opened(options)  # mistakes in params show before Prefect's start
    _freeze(experiment)
    return _flow(experiment.root, "flows.experiment", experiment.reference)


def _sweep(options: argparse.Namespace) -> int:
    from pi0rl.sweeps import describe, experiments, grid_points, load_sweep

    sweep = load_sweep(options.sweep, options.overrides)
    points = () if sweep.search else grid_points(sweep)
    chains = [experiments(options.sweep, sweep, point) for point in points]
    if options.list:
        print(describe(sweep, points))
        return 0
    if options.compare:
        return _compare_reported(options.sweep, points, [chain[-1] for chain in chains])
    root = chains[0][-1].root if chains else project_root()
    return _flow(root, "flows.sweep", options.sweep, *options.overrides)


def _compare_reported(name: str, points: Sequence[Point], own: Sequence[Experiment]) -> int:
    from pi0rl.report.sweep import Finished, write_sweep_report
    from pi0rl.sweeps import sweep_report_dir

    finished = [
        Finished(point.name, point.coordinates, experiment.report_dir)
        for point, experiment in zip(points, own, strict=True)
        if (experiment.report_dir / "results.json").is_file()
    ]
    if not finished:
        raise UserError(f"sweep {name}: no point has a report in {sweep_report_dir(name).parent}; run the sweep first")
    target = write_sweep_report(name, finished, sweep_report_dir(name))
    print(f"comparison of {len(finished)} of {len(points)} points: {target}")
    return 0


def _flow(root: Path, module: str, *arguments: str) -> int:
    """A flow in a process of its own, so that even a killed Prefect server or flow leaves nothing behind."""
    home = root / ".prefect"
    home.mkdir(exist_ok=True)  # a file in the way shows here, not in Prefect's start
    environment = {
        "PREFECT_HOME": str(home),
        "PREFECT_PLUGINS_ENABLED": "false",  # ours is about the command line
        "PREFECT_LOGGING_LEVEL": "CRITICAL",  # the stages speak for themselves
        "PREFECT_INTERNAL_LOGGING_LEVEL": "CRITICAL",
        "DO_NOT_TRACK": "1",
    }
    command = [sys.executable, "-m", module, *arguments]
    code = run_child(command, cwd=root, environment=environment, on_line=None, send=os.kill)
    if code in (130, 143):
        raise Interrupted(code - 128)
    return code


def _restore(options: argparse.Namespace) -> None:
    from pi0rl.restore import restore

    print(f"restored to {restore(options.run, options.output)}")


def _reproduce(options: argparse.Namespace) -> int:
    from pi0rl.reproduce import code_differences, compare, repetition

    run, experiment = repetition(options.run)
    for line in code_differences(run, experiment.root):
        print(f"not as it was: {line}", file=sys.stderr)
    freeze(experiment)
    if code := _flow(experiment.root, "flows.experiment", experiment.reference):
        return code
    comparisons = compare(run, experiment)
    for comparison in comparisons:
        print(comparison)
    return 1 if any(comparison.difference for comparison in comparisons) else 0


def _status(options: argparse.Namespace) -> int:
    from pi0rl.status import print_status

    return print_status(_opened(options))


def _plan(options: argparse.Namespace) -> int:
    from pi0rl.plan import print_plan

    experiment = open_experiment(options.experiment, tuple(options.overrides))
    return print_plan(options.experiment, experiment.params, options.gpus, options.gpu_memory, options.memory)


def _doctor(options: argparse.Namespace) -> int:
    from pi0rl.doctor import examine

    return examine()


_COMMANDS = {
    **dict.fromkeys(STAGES, _stage),
    "evaluate": _evaluate,
    "compare": _compare,
    "run": _run,
    "sweep": _sweep,
    "restore": _restore,
    "reproduce": _reproduce,
    "status": _status,
    "plan": _plan,
    "doctor": _doctor,
    "checkpoint": _checkpoint,
    "dataset": _dataset,
}

if __name__ == "__main__":
    sys.exit(main())
