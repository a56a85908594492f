"""What this machine computes and renders with, to be recorded beside what it made."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from shutil import which

_TIMEOUT_SECONDS = 30


@dataclass(frozen=True)
class Machine:
    """A machine; what cannot be found out is empty.

    Attributes:
        cores: that this process may use.
        cpu: the name of the processor.
        gpus: names of the NVIDIA GPUs that this process may use.
        renderer: back end, renderer and version of OpenGL, e.g. ``osmesa: llvmpipe (LLVM 15.0.6, 256 bits), 4.5 ...``.
    """

    cores: int
    cpu: str
    gpus: tuple[str, ...]
    renderer: str

    def __str__(self) -> str:
        """``2 cores and 1 GPU``."""
        cores = f"{self.cores} core{'s' if self.cores != 1 else ''}"
        return cores + (f" and {len(self.gpus)} GPU{'s' if len(self.gpus) > 1 else ''}" if self.gpus else "")


def this_machine() -> Machine:
    """The one this runs on; of a Ray cluster, the one that the command was given on. Takes about a second."""
    return Machine(len(os.sched_getaffinity(0)), processor_name(), _gpus(), _renderer())


def processor_name() -> str:
    """As Linux names it, or at least its architecture."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def nvidia_smi(query: str) -> str:
    """The table of ``nvidia-smi --query-gpu=<query>``, a line per GPU; empty without a driver, or if it is silent."""
    if which("nvidia-smi") is None:
        return ""
    return _output(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"])


def _gpus() -> tuple[str, ...]:
    rows = [[cell.strip() for cell in line.split(",", 2)] for line in nvidia_smi("index,uuid,name").splitlines()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    allowed = None if visible is None else {name.strip() for name in visible.split(",")}
    return tuple(name for index, uuid, name in rows if allowed is None or {index, uuid} & allowed)


def _renderer() -> str:
    # As env workers do: an empty variable would hide the GPUs from EGL.
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return _output([sys.executable, "-m", "pi0rl.libero.renderer"], environment).strip()


def _output(command: list[str], environment: dict[str, str] | None = None) -> str:
    """What a program prints; nothing where it fails or does not answer."""
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout if done.returncode == 0 else ""
