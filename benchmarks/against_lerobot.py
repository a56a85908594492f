"""LeRobot's pi0 beside ours: the same weights, inputs and noise, run by the Python of LeRobot's own environment.

It needs other versions of Python, torch and transformers than pi0rl, so the two exchange files.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pi0rl.errors import UserError
from pi0rl.policy.export import save_lerobot
from pi0rl.policy.model import ModelInputs
from pi0rl.policy.policy import Policy
from pi0rl.policy.sampling import SamplingNoise

CHECKPOINT, INPUTS, OURS, THEIRS = "lerobot", "inputs.safetensors", "ours.safetensors", "theirs.safetensors"


def write(
    policy: Policy, inputs: ModelInputs, noise: SamplingNoise, num_steps: int, actions: Tensor, folder: Path
) -> None:
    """What ``measure`` compares: checkpoint, inputs, x_T and our actions [B, H, D] after ``num_steps`` ODE steps."""
    arrays = {name: getattr(inputs, name).contiguous() for name in ModelInputs.__dataclass_fields__}
    more = {"noise": noise.initial.contiguous(), "num_steps": torch.tensor(num_steps)}
    save_file(arrays | more, folder / INPUTS)
    save_file({"actions": actions}, folder / OURS)
    save_lerobot(policy, folder / CHECKPOINT)


def measure(python: str, folder: Path, rounds: int, threads: int) -> dict[str, Any]:
    """Processor seconds of LeRobot's looks on what ``write`` left, and how far its actions are from ours."""
    script = Path(__file__).with_name("lerobot_look.py")
    files = [folder / name for name in (CHECKPOINT, INPUTS, THEIRS)]
    done = subprocess.run([python, "-P", script, *files, str(rounds), str(threads)], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no message"]
        raise UserError(f"--lerobot {python}: LeRobot's pi0 did not run ({said[-1]}); expected a Python that has it")
    theirs, ours = load_file(folder / THEIRS), load_file(folder / OURS)
    with safe_open(folder / THEIRS, framework="pt") as file:
        versions = file.metadata()
    apart = float((theirs["actions"] - ours["actions"]).abs().max())
    return {"versions": versions, "seconds": theirs["seconds"].tolist(), "actions": apart}


def lines(result: dict[str, Any] | None, own: float) -> list[str]:
    """For the table; ``own`` is what a look takes us."""
    if result is None:
        return ["LeRobot's implementation was not compared: it is not installed here (see `--lerobot`)."]
    versions, theirs = result["versions"], median(result["seconds"])
    return [
        f"LeRobot {versions['lerobot']} (torch {versions['torch']}) with the same weights and inputs: a look takes "
        f"{theirs:.3g} s, {theirs / own:.2f} x; actions differ by at most {result['actions']:.1e}. It ran after the "
        "rounds above, not among them."
    ]
