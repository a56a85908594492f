"""A small project whose stages are shell commands, to try the command line, DVC and Prefect in seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from pi0rl.processes import die_with_parent

ROOT = Path(__file__).parents[1]

PARAMS = "seed: 0\ndemos: {seed: 0}\n"

# The shape of the real file: vars, resolve, then stages that read and write below ${run}
STAGES = """
vars:
  - experiment: quickstart
    params: runs/quickstart/params.yaml
    run: runs/quickstart
    demos_dir: runs/quickstart/demos
    sft_dir: runs/quickstart/sft
    report: reports/quickstart
stages:
  resolve:
    cmd: pi0rl resolve ${experiment}
    deps: [params]
    outs:
      - ${params}: {cache: false}
  demos:
    cmd: mkdir -p ${demos_dir} && cp ${params} ${demos_dir}/ && echo 'demos 1/1'
    params:
      - ${params}: [demos]
    outs: ["${demos_dir}"]
  sft:
    cmd: sh stage.sh ${sft_dir}
    deps: ["${demos_dir}"]
    params:
      - ${params}: [seed]
    outs: ["${sft_dir}"]
metrics: []
plots: []
"""

# What a sweep compares; `pi0rl train` is trouble.sh: see make_sweep
MORE_STAGES = """
  train:
    cmd: sh trouble.sh ${run}/train
    deps: ["${sft_dir}"]
    params:
      - ${params}: [seed, actor.optim.lr]
    outs: ["${run}/train"]
  report:
    cmd: mkdir -p ${report} && cp results.json ${report}/
    deps: ["${run}/train"]
    outs:
      - ${report}: {cache: false}
"""

# A point waits for another one to be under way too, fails where a file fail-<point> is, and is killed, together with
# the dvc above it, where a file kill-<point> is, once. A GPU that it was given leaves a file gpu-<number>; where two
# points have the same one, the second fails.
TROUBLE = """
point=$(basename $(dirname $1))
if [ -e fail-$point ]; then echo 'pi0rl: error: no GL driver; install one' >&2; exit 2; fi
if [ -e kill-$point ]; then rm kill-$point; kill -9 0; fi
if [ -n "$CUDA_VISIBLE_DEVICES" ]; then
  touch gpu-$CUDA_VISIBLE_DEVICES
  mkdir busy-$CUDA_VISIBLE_DEVICES || exit 1
fi
touch running-$point
if [ -e slow ]; then sleep 300 & echo $! > sleeper; wait; fi
for i in $(seq 100); do
  [ $(ls running-* | wc -l) -ge 2 ] && touch overlapped
  [ -e overlapped ] && break
  sleep 0.2
done
sleep 1
rm running-$point
[ -n "$CUDA_VISIBLE_DEVICES" ] && rmdir busy-$CUDA_VISIBLE_DEVICES
mkdir -p $1 && echo done > $1/file && echo $point >> log
"""

SWEEP = "experiment: quickstart\naxes: {actor.optim.lr: [1.0e-4, 2.0e-4]}\nseeds: [0, 1]\nconcurrency: 2\n"

RESULTS = {
    "rows": [
        {
            "policy": policy,
            "split": "held_out",
            "suite": "libero_object",
            "k": k,
            "n": 10,
            "errors": 0,
            "wilson": [0.1, 0.9],
        }
        for policy, k in (("sft", 3), ("ppo", 6))
    ],
    "comparisons": [
        {"before": "sft", "after": "ppo", "split": "held_out", "suite": "libero_object"}
        | {"change": 0.3, "gained": 3, "lost": 0, "n": 10, "mcnemar_p": 0.25}
    ],
    "tasks": [
        {"split": "held_out", "suite": "libero_object", "task_id": 0, "counts": {"sft": [3, 10], "ppo": [6, 10]}}
    ],
    "protocol": "0123456789ab",
    "checkpoints_sha256": {"sft/policy/model.safetensors": "00"},
}


def make_project(folder: Path, stage: str = "mkdir -p $1 && echo done > $1/file") -> Path:
    """A project in ``folder`` whose stage ``sft`` runs the shell script ``stage``."""
    (folder / "params").mkdir(parents=True)
    (folder / "params" / "quickstart.yaml").write_text(PARAMS)
    (folder / "dvc.yaml").write_text(STAGES)
    (folder / "stage.sh").write_text(stage)
    for shared in (".gitignore", "prefect.toml"):
        (folder / shared).write_text((ROOT / shared).read_text())
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run([Path(sys.executable).parent / "dvc", "init", "-q"], cwd=folder, check=True, env=environment())
    return folder


def make_sweep(folder: Path) -> Path:
    """A project with a sweep of two learning rates and two seeds, two points at a time."""
    make_project(folder)
    text = (folder / "dvc.yaml").read_text()
    (folder / "dvc.yaml").write_text(text.replace("metrics: []", MORE_STAGES + "metrics: []"))
    (folder / "trouble.sh").write_text(TROUBLE)
    (folder / "results.json").write_text(json.dumps(RESULTS))
    (folder / "params" / "sweeps").mkdir()
    (folder / "params" / "sweeps" / "quickstart.yaml").write_text(SWEEP)
    return folder


def dvc(*arguments: str, cwd: Path) -> str:
    """Run ``dvc ARGUMENTS``, which must succeed; returns what it printed."""
    command = [str(Path(sys.executable).parent / "dvc"), *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def environment() -> dict[str, str]:
    """This process's variables with the stages' commands on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1", "PYTHONPATH": str(ROOT)}


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """Start ``pi0rl ARGUMENTS``; it ends with the test process."""
    return subprocess.Popen(
        [sys.executable, "-m", "pi0rl.cli", *arguments],
        cwd=cwd,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=die_with_parent,
    )


def call(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run ``pi0rl ARGUMENTS`` to its end."""
    process = start(*arguments, cwd=cwd)
    out, err = process.communicate(timeout=1200)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)
