"""A set of demonstrations made on the spot: noise to imitate."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pi0rl.libero.suites import suite_tasks
from pi0rl.sft.assembling import assemble
from pi0rl.sft.recording import Recording, part_name, save_part


def make_demonstrations(folder: Path) -> Path:
    """Two short episodes of every task of libero_goal, in a folder below ``folder``."""
    rng, chosen = np.random.default_rng(0), []
    (folder / "parts").mkdir()
    (folder / "demos").mkdir()
    for task in suite_tasks("libero_goal"):
        for number in range(2):
            state = rng.normal(size=(5, 8)).astype(np.float32)
            images = rng.integers(0, 256, (5, 2, 64, 64, 3), dtype=np.uint8)
            recording = Recording(True, state, np.tanh(state[:, :7]), images)
            save_part(recording, folder / "parts" / part_name(task, number))
        chosen.append((task, [0, 1]))
    described = {"fingerprint": "0" * 16, "collection": {"action_noise": 0.0, "split": "official", "seed": 0}}
    assemble(described, 64, 1, chosen, folder / "parts", folder / "demos")
    return folder / "demos"
