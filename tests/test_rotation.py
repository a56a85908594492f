"""Image rotation on rendered frames: done once, by the processing, and the way openpi and RLinf do it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from tiny_policies import make_policy

from pi0rl.libero.rendering import PROFILES, Renderer
from pi0rl.libero.simulation import Simulation
from pi0rl.libero.suites import official_init_states, task
from pi0rl.observation import Observation

SCENE, SIZE = task("libero_goal", 7), 64
STILL, LEFT, RIGHT = [0, 0, 0, 0, 0, 0, -1], [0, 1, 0, 0, 0, 0, -1], [0, -1, 0, 0, 0, 0, -1]
UP, DOWN = [0, 0, 1, 0, 0, 0, -1], [0, 0, -1, 0, 0, 0, -1]


def frames_after(*actions: list[float]) -> np.ndarray:
    """What the front camera sees after the arm has followed each action from the same start."""
    simulation, renderer = Simulation(SCENE), Renderer(SIZE, PROFILES["fast"])
    frames = []
    for action in actions:
        simulation.reset(official_init_states(SCENE)[0], settle_steps=0)
        simulation.step_chunk(np.tile(action, (10, 1)))
        frames.append(renderer.render(SCENE, 0, simulation.render_state(), "agentview"))
    return np.stack(frames)


def centre_of_change(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Row and column around which two pictures [3, S, S] differ."""
    change = np.abs(one - other).sum(0)
    rows, columns = np.indices(change.shape)
    return np.array([(rows * change).sum(), (columns * change).sum()]) / change.sum()


def test_the_network_sees_the_scene_upright_and_mirrored() -> None:
    """LIBERO's frames stand on their heads. Rotated by 180 degrees they are upright, and mirrored left to right:

    the camera looks at the robot from the front, so the robot's left (+y) is on the right for a person there.
    """
    frames = frames_after(STILL, LEFT, RIGHT, UP, DOWN)
    processing = replace(make_policy().processing, image_size=SIZE)
    look = Observation(frames, frames, np.zeros((5, 8), np.float32), ("turn on the stove",) * 5)
    seen = processing.inputs(look).images.numpy()
    rotated = np.rot90(frames, 2, axes=(1, 2)).astype(np.float32) / 255 * 2 - 1
    for camera in (0, 1):
        np.testing.assert_array_equal(seen[:, camera].transpose(0, 2, 3, 1), rotated)
    left, right, up, down = (centre_of_change(seen[0, 0], picture) for picture in seen[1:, 0])
    assert left[1] < right[1] - 2
    assert up[0] < down[0] - 2
