"""Runs LIBERO's own environment as its users do, in a process of its own, and records what it returns.

    python reference_env.py BDDL_FILE SEED CAMERA_SIZE INPUT.npz OUTPUT.npz

The input holds `actions` [N, 7] and, unless the placement drawn with the seed is wanted, `init_state`. Row 0 of the
output belongs to the instant after the reset.
"""

from __future__ import annotations

import sys

import numpy as np
from libero.libero.envs import OffScreenRenderEnv

OBSERVED = (
    "agentview_image", "robot0_eye_in_hand_image", "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"
)  # fmt: skip


def main(bddl_file: str, seed: str, camera_size: str, source: str, target: str) -> None:
    size = int(camera_size)
    environment = OffScreenRenderEnv(bddl_file_name=bddl_file, camera_heights=size, camera_widths=size)
    with np.load(source) as arrays:
        given = dict(arrays)
    environment.seed(int(seed))
    observation, reward, done = environment.reset(), 0.0, False
    if "init_state" in given:
        observation = environment.set_init_state(given["init_state"])
    rows = []
    for action in [None, *given["actions"]]:
        if action is not None:
            observation, reward, done, _ = environment.step(action)
        data = environment.sim.data
        outcome = {"qpos": data.qpos, "qvel": data.qvel, "reward": reward, "done": done}
        rows.append({name: np.array(value) for name, value in outcome.items()})
        rows[-1] |= {name: np.array(observation[name]) for name in OBSERVED}
    np.savez(target, allow_pickle=False, **{name: np.stack([row[name] for row in rows]) for name in rows[0]})


if __name__ == "__main__":
    main(*sys.argv[1:])
