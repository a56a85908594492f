"""Pictures: the reference profile equals LIBERO's own renderer; the fast one shows the same scene."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pi0rl.errors import UserError
from pi0rl.libero import gl
from pi0rl.libero.gl import create_context
from pi0rl.libero.rendering import PROFILES, Renderer, RenderProfile, process_context
from pi0rl.libero.simplify import Mesh, cluster
from pi0rl.libero.simulation import Simulation
from pi0rl.libero.suites import official_init_states, task

TASK = task("libero_goal", 7)  # the stove, whose box reflects the scene
CAMERAS = ("agentview", "robot0_eye_in_hand")
ACTIONS = np.tile([0.3, -0.2, -0.5, 0.1, 0.0, 0.2, -1.0], (3, 1))

# A process of its own: robosuite draws into whatever GL context is current.
REFERENCE = """
import sys
import numpy as np
from libero.libero.envs import OffScreenRenderEnv
bddl_file, inputs, output = sys.argv[1:]
with np.load(inputs) as arrays:
    state, actions = arrays["state"], arrays["actions"]
environment = OffScreenRenderEnv(bddl_file_name=bddl_file, camera_heights=128, camera_widths=128)
environment.seed(0)
environment.reset()
environment.set_init_state(state)
for action in actions:
    observation = environment.step(action)[0]
np.savez(output, **{camera: observation[camera + "_image"] for camera in ("agentview", "robot0_eye_in_hand")})
"""


@pytest.fixture(scope="module")
def simulation() -> Simulation:
    simulation = Simulation(TASK, seed=0)
    simulation.reset(official_init_states(TASK)[0], settle_steps=0)
    simulation.step_chunk(ACTIONS)
    return simulation


def test_reference_profile_is_pixel_identical(simulation: Simulation, tmp_path: Path):
    inputs, output = tmp_path / "inputs.npz", tmp_path / "images.npz"
    np.savez(inputs, state=official_init_states(TASK)[0], actions=ACTIONS)
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment["LIBERO_CONFIG_PATH"] = str(tmp_path)
    command = [sys.executable, "-c", REFERENCE, str(TASK.bddl_file), str(inputs), str(output)]
    subprocess.run(command, check=True, env=environment, stdin=subprocess.DEVNULL, capture_output=True)
    renderer = Renderer(128, PROFILES["reference"])
    with np.load(output) as images:
        for camera in CAMERAS:
            picture = renderer.render(TASK, 0, simulation.render_state(), camera)
            np.testing.assert_array_equal(picture, images[camera])


def test_fast_profile_shows_the_same_scene(simulation: Simulation):
    state = simulation.render_state()
    fast = Renderer(64, PROFILES["fast"])
    original = Renderer(64, RenderProfile(multisamples=0, reflection=False, mesh_cells=None))
    for camera in CAMERAS:
        ours, theirs = (renderer.render(TASK, 0, state, camera).astype(float) for renderer in (fast, original))
        psnr = 10 * np.log10(255**2 / np.mean((ours - theirs) ** 2))
        assert psnr > 22, f"{camera}: {psnr:.1f} dB"
        np.testing.assert_array_equal(ours, fast.render(TASK, 0, state, camera))


def test_two_renderers_of_one_process_do_not_disturb_each_other(simulation: Simulation):
    small, large = Renderer(64, PROFILES["fast"]), Renderer(128, PROFILES["fast"])
    state = simulation.render_state()
    before = small.render(TASK, 0, state, "agentview")
    assert large.render(TASK, 0, state, "agentview").shape == (128, 128, 3)
    np.testing.assert_array_equal(small.render(TASK, 0, state, "agentview"), before)


def test_another_context_of_the_process_stays_current(simulation: Simulation):
    state, renderer = simulation.render_state(), Renderer(64, PROFILES["fast"])
    before = renderer.render(TASK, 0, state, "agentview")
    other = create_context()
    back = other.switch()
    try:
        np.testing.assert_array_equal(renderer.render(TASK, 0, state, "agentview"), before)
        # Switching to what is current has nothing to put back.
        assert other.switch() is gl._leave
    finally:
        back()
    assert process_context().switch() is gl._leave


def test_a_second_thread_is_refused(simulation: Simulation):
    state, renderer = simulation.render_state(), Renderer(64, PROFILES["fast"])
    renderer.render(TASK, 0, state, "agentview")
    if process_context().backend == "osmesa":
        pytest.skip("OSMesa does not mind")
    with ThreadPoolExecutor(1) as pool, pytest.raises(UserError, match="one thread per process"):
        pool.submit(renderer.render, TASK, 0, state, "agentview").result()


def test_unknown_camera_and_size_are_refused(simulation: Simulation):
    with pytest.raises(UserError, match="unknown camera 'front'"):
        Renderer(64, PROFILES["fast"]).render(TASK, 0, simulation.render_state(), "front")  # pyright: ignore
    with pytest.raises(UserError, match="expected 1 to 4096"):
        Renderer(0, PROFILES["fast"])


def test_clustering_keeps_the_shape_of_a_sphere():
    polar, around = np.meshgrid(
        np.linspace(0, np.pi, 60), np.linspace(0, 2 * np.pi, 120, endpoint=False), indexing="ij"
    )
    points = np.stack([np.sin(polar) * np.cos(around), np.sin(polar) * np.sin(around), np.cos(polar)], -1)
    index = np.arange(60 * 120).reshape(60, 120)
    a, b, c, d = index[:-1], np.roll(index, -1, 1)[:-1], index[1:], np.roll(index, -1, 1)[1:]
    faces = np.concatenate([np.stack(corners, -1).reshape(-1, 3) for corners in ((a, c, b), (b, c, d))])
    sphere = points.reshape(-1, 3)
    coarse = cluster(Mesh(sphere, sphere, faces, faces), cells=16)
    assert len(coarse.faces) < len(faces) / 5
    radius = np.linalg.norm(coarse.positions, axis=1)
    assert 0.97 < radius.min() <= radius.max() <= 1.0 + 1e-9
    p, q, r = (coarse.positions[coarse.faces[:, corner]] for corner in range(3))
    outward = np.einsum("ij,ij->i", np.cross(q - p, r - p), coarse.normals[coarse.face_normals[:, 0]])
    assert (outward > 0).mean() > 0.98
