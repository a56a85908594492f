"""A small project whose stages are shell commands, to try the command line, DVC and Prefect in seconds."""

from __future__ import annotations

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
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)
