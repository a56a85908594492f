"""Runs LIBERO's own environment in a process of its own and records what it does.

    python reference_rollout.py BDDL_FILE SEED INPUT.npz OUTPUT.npz

The input holds `init_state`, `actions` [N, 7] and `probes` [M, state]: further states whose success is asked for.
Each output row belongs to one instant; row 0 is the one after `set_init_state`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from pi0rl.libero.build import reference_environment

OBSERVED = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")


def main(bddl_file: str, seed: str, source: str, target: str) -> None:
    environment = reference_environment(Path(bddl_file))
    environment.seed(int(seed))
    environment.reset()
    rows: list[dict[str, np.ndarray]] = []

    def record(observation: dict[str, np.ndarray], success: bool) -> None:
        simulator = environment.sim
        state = {"qpos": simulator.data.qpos, "qvel": simulator.data.qvel, "site_rgba": simulator.model.site_rgba}
        observed = {name: observation[name] for name in OBSERVED}
        rows.append({name: np.array(value) for name, value in {**state, **observed, "success": success}.items()})

    with np.load(source) as given:
        record(environment.set_init_state(given["init_state"]), environment.check_success())
        for action in given["actions"]:
            observation, _, success, _ = environment.step(action)
            record(observation, success)
        probed = []
        for probe in given["probes"]:
            environment.set_init_state(probe)
            probed.append(bool(environment.check_success()))
    table = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    np.savez(target, allow_pickle=False, probed=np.array(probed, bool), **table)


if __name__ == "__main__":
    main(*sys.argv[1:])
