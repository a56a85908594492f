"""Plays one episode in LIBERO's own environment, in a process of its own, and records what it does.

    python -m benchmarks.reference_rollout BDDL_FILE SEED INPUT.npz OUTPUT.npz

The input holds `init_state`, `actions` [N, 7], `probes` [M, state] (further states whose success is asked for), `looks`
(rows of which pictures are taken) and `sizes` (of the pictures, in pixels). Each output row belongs to one instant; row
0 is the one after `set_init_state`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from pi0rl.libero.build import configure_robosuite

OBSERVED = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
CAMERAS = ("agentview", "robot0_eye_in_hand")


def off_screen_environment(bddl_file: str, camera_size: int) -> Any:
    """`OffScreenRenderEnv` as its users make it, with the GL back end that `MUJOCO_GL` named."""
    if "PI0RL_GL" in os.environ:
        os.environ["MUJOCO_GL"] = os.environ["PYOPENGL_PLATFORM"] = os.environ["PI0RL_GL"]
    configure_robosuite()
    from libero.libero.envs import OffScreenRenderEnv

    return OffScreenRenderEnv(bddl_file_name=bddl_file, camera_heights=camera_size, camera_widths=camera_size)


class Photographer:
    """Takes the cameras' place among the observables: pictures only when asked, then in all sizes at that instant."""

    def __init__(self, environment: Any, sizes: list[int]):
        self._base = environment.env
        self._sizes = sizes
        self.asked = False
        self.pictures: dict[str, np.ndarray] = {}
        for camera in CAMERAS:
            self._base.modify_observable(f"{camera}_image", "sensor", self._sensor(camera))

    def _sensor(self, camera: str) -> Callable[[dict[str, Any]], np.ndarray]:
        def sense(_cache: dict[str, Any]) -> np.ndarray:
            if self.asked:
                for size in self._sizes:
                    picture = self._base.sim.render(camera_name=camera, width=size, height=size)
                    self.pictures[f"{camera}_{size}"] = picture
            return np.zeros((1, 1, 3), np.uint8)

        sense.__modality__ = "image"  # how robosuite tells a sensor from another function
        return sense


def main(bddl_file: str, seed: str, source: str, target: str) -> None:
    with np.load(source) as arrays:
        given = dict(arrays)
    sizes, looks = given["sizes"].tolist(), set(given["looks"].tolist())
    environment = off_screen_environment(bddl_file, max(sizes))
    environment.seed(int(seed))
    environment.reset()
    photographer = Photographer(environment, sizes)
    rows: list[dict[str, np.ndarray]] = []
    pictures: dict[str, np.ndarray] = {}

    def record(play: Callable[[], tuple[dict[str, np.ndarray], bool]]) -> None:
        row = len(rows)
        photographer.asked = row in looks
        observation, success = play()
        simulator = environment.sim
        state = {"qpos": simulator.data.qpos, "qvel": simulator.data.qvel, "site_rgba": simulator.model.site_rgba}
        observed = {name: observation[name] for name in OBSERVED}
        rows.append({name: np.array(value) for name, value in {**state, **observed, "success": success}.items()})
        if photographer.asked:
            pictures.update({f"{name}_at_{row}": picture for name, picture in photographer.pictures.items()})

    def step(action: np.ndarray) -> tuple[dict[str, np.ndarray], bool]:
        observation, _, success, _ = environment.step(action)
        return observation, success

    record(lambda: (environment.set_init_state(given["init_state"]), environment.check_success()))
    for action in given["actions"]:
        record(lambda action=action: step(action))
    photographer.asked = False
    probed = []
    for probe in given["probes"]:
        environment.set_init_state(probe)
        probed.append(bool(environment.check_success()))
    table = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    np.savez(target, allow_pickle=False, probed=np.array(probed, bool), **table, **pictures)
    os._exit(0)  # robosuite frees its GL contexts after EGL has gone, which ends in a screen of errors


if __name__ == "__main__":
    main(*sys.argv[1:])
