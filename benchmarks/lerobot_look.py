"""Run by LeRobot's own interpreter: looks of its pi0 on a given batch, timed.

    python -P benchmarks/lerobot_look.py CHECKPOINT INPUTS OUTPUTS ROUNDS THREADS

Tried with LeRobot 0.6.1, which builds its network in float32 first: 16 GB for a moment at full size.

``INPUTS`` holds what ``against_lerobot.write`` wrote; ``OUTPUTS`` gets the actions and processor seconds per round.
Nothing of pi0rl is imported: LeRobot needs other versions of torch and Python.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from time import process_time

import torch
from lerobot.policies.pi0.modeling_pi0 import PI0Policy  # pyright: ignore[reportMissingImports]
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn


def check_loaded(policy: nn.Module, file: Path) -> None:
    """LeRobot prints a warning and goes on with random weights where it cannot load them."""
    with safe_open(file, framework="pt") as stored:
        for name, weight in policy.state_dict().items():
            if not torch.equal(weight, stored.get_tensor(name).to(weight.dtype)):
                sys.exit(f"LeRobot did not load {name} of {file}")


@torch.no_grad()
def main(checkpoint: str, inputs: Path, outputs: Path, rounds: int, threads: int) -> None:
    """Load, look once to warm up, then ``rounds`` times."""
    torch.set_num_threads(threads)
    policy = PI0Policy.from_pretrained(checkpoint).eval()
    check_loaded(policy, Path(checkpoint) / "model.safetensors")
    model = policy.model
    arrays = load_file(inputs)
    images, masks = list(arrays["images"].unbind(1)), list(arrays["image_mask"].unbind(1))
    batch = images, masks, arrays["tokens"], arrays["token_mask"], arrays["state"]
    steps = int(arrays["num_steps"])
    actions = model.sample_actions(*batch, noise=arrays["noise"], num_steps=steps)
    seconds = []
    for _ in range(rounds):
        started = process_time()
        model.sample_actions(*batch, noise=arrays["noise"], num_steps=steps)
        seconds.append(process_time() - started)
    results = {"actions": actions.float().contiguous(), "seconds": torch.tensor(seconds)}
    save_file(results, outputs, metadata={"lerobot": version("lerobot"), "torch": torch.__version__})


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
