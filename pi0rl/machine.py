"""What this machine computes and renders with, to be recorded beside what it made.

`python -m pi0rl.machine` prints what renders: a GL context is made in a process of its own, as it cannot be unmade.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from shutil import which

from pi0rl.errors import UserError

_GL_RENDERER, _GL_VERSION = 0x1F01, 0x1F02
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
    return Machine(len(os.sched_getaffinity(0)), _cpu(), _gpus(), _renderer_in_process())


def _cpu() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpus() -> tuple[str, ...]:
    if which("nvidia-smi") is None:
        return ()
    lines = _output(["nvidia-smi", "--query-gpu=index,uuid,name", "--format=csv,noheader"]).splitlines()
    rows = [[cell.strip() for cell in line.split(",", 2)] for line in lines]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    allowed = None if visible is None else {name.strip() for name in visible.split(",")}
    return tuple(name for index, uuid, name in rows if allowed is None or {index, uuid} & allowed)


def _renderer_in_process() -> str:
    # As env workers do: an empty variable would hide the GPUs from EGL.
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return _output([sys.executable, "-m", "pi0rl.machine"], environment).strip()


def _output(command: list[str], environment: dict[str, str] | None = None) -> str:
    """What a program prints; nothing where it fails or does not answer."""
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout if done.returncode == 0 else ""


def _renderer() -> str:
    from pi0rl.libero.gl import create_context

    context = create_context()
    if context.backend == "egl":
        address_of = ctypes.CDLL("libEGL.so.1").eglGetProcAddress
    else:
        address_of = ctypes.CDLL(None).OSMesaGetProcAddress  # create_context has made its symbols global
    address_of.restype = ctypes.c_void_p
    get_string = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_uint)(address_of(b"glGetString"))
    told = [(get_string(name) or b"").decode(errors="replace") for name in (_GL_RENDERER, _GL_VERSION)]
    return f"{context.backend}: {', '.join(told)}"


if __name__ == "__main__":
    try:
        print(_renderer())
    except UserError as error:
        sys.exit(str(error))
