"""Pictures of a simulation's state, pixel-identical to LIBERO's own or many times faster."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import mujoco
import numpy as np

from pi0rl.errors import UserError
from pi0rl.libero.compile import full_model
from pi0rl.libero.gl import GLContext, create_context
from pi0rl.libero.render_cache import cached_simplified_model
from pi0rl.libero.simplify import VISIBLE_GROUPS
from pi0rl.libero.simulation import RenderState
from pi0rl.libero.suites import Task

Camera = Literal["agentview", "robot0_eye_in_hand", "frontview"]

# robosuite's limit, which decides what a crowded scene drops.
_MAX_DRAWN_GEOMS = 1000
# Models kept per renderer, by size; with GL's copies the process holds about three times as much. Six original scenes
# fit, and any number of simplified ones.
_MAX_MODEL_BYTES = 2_000_000_000


@dataclass(frozen=True)
class RenderProfile:
    """How much work goes into a picture; the physics is the same in all.

    Attributes:
        multisamples: Samples per pixel; LIBERO uses 4, 0 turns anti-aliasing off.
        reflection: Whether reflecting surfaces draw the scene a second time.
        mesh_cells: Grid cells along a mesh's longest side for vertex clustering; None keeps the original meshes and
            textures.
    """

    multisamples: int
    reflection: bool
    mesh_cells: int | None


PROFILES = {
    "reference": RenderProfile(multisamples=4, reflection=True, mesh_cells=None),
    "fast": RenderProfile(multisamples=0, reflection=False, mesh_cells=16),
}


@dataclass(frozen=True)
class _Scene:
    """A task's render model with its GL resources and work space."""

    model: mujoco.MjModel
    data: mujoco.MjData
    resources: mujoco.MjrContext
    drawing: mujoco.MjvScene


class Renderer:
    """Draws square pictures of any task's states; for one thread.

    The GL context is made with the first picture and shared by all renderers of the process. A task's model is loaded
    with its first picture and kept while there is room: 20 MB in the fast profile, 0.9 GB with the original meshes.

    Attributes:
        size: Width and height in pixels.
        profile: What is drawn.
    """

    def __init__(self, size: int, profile: RenderProfile):
        if not 1 <= size <= 4096:
            raise UserError(f"image size {size}: expected 1 to 4096 pixels")
        self.size = size
        self.profile = profile
        self._scenes: dict[Task, _Scene] = {}
        self._view = mujoco.MjvCamera()
        self._view.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._options = mujoco.MjvOption()
        for group in range(len(self._options.geomgroup)):
            self._options.geomgroup[group] = group in VISIBLE_GROUPS

    def render(self, task: Task, seed: int, state: RenderState, camera: Camera) -> np.ndarray:
        """A picture in LIBERO's own orientation (rows from the bottom up, as in its observations).

        Args:
            task: The task; decides the model.
            seed: The simulation's seed. Where the fixtures stand comes with `state`; a model built for one seed
                serves all.
            state: What `Simulation.render_state` returns.
            camera: Name of a camera of the scene.

        Returns:
            uint8 [size, size, 3].

        Raises:
            UserError: No GL back end works, the camera does not exist, or the state belongs to another task.
        """
        with process_context().current():
            return self._render(self._scene(task, seed), task, state, camera)

    def _render(self, scene: _Scene, task: Task, state: RenderState, camera: Camera) -> np.ndarray:
        model, data = scene.model, scene.data
        if state.qpos.shape != (model.nq,) or state.body_pos.shape != (model.nbody, 3):
            raise UserError(
                f"state of {state.qpos.size} joint positions: {task.suite} task {task.task_id} has {model.nq}"
            )
        self._view.fixedcamid = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, camera)
        if self._view.fixedcamid < 0:
            known = ", ".join(model.camera(index).name for index in range(model.ncam))
            raise UserError(f"unknown camera {camera!r}: {task.suite} task {task.task_id} has {known}")
        data.qpos[:] = state.qpos
        model.body_pos[:] = state.body_pos
        model.body_quat[:] = state.body_quat
        model.site_rgba[:] = state.site_rgba
        mujoco.mj_kinematics(model, data)
        mujoco.mj_camlight(model, data)
        mujoco.mjv_updateScene(
            model, data, self._options, None, self._view, mujoco.mjtCatBit.mjCAT_ALL.value, scene.drawing
        )
        picture = np.empty((self.size, self.size, 3), np.uint8)
        area = mujoco.MjrRect(0, 0, self.size, self.size)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, scene.resources)
        mujoco.mjr_render(area, scene.drawing, scene.resources)
        mujoco.mjr_readPixels(picture, None, area, scene.resources)
        return picture

    def _scene(self, task: Task, seed: int) -> _Scene:
        """The task's scene, loaded if need be; those longest unused make room for it."""
        scene = self._scenes.pop(task, None) or self._load(task, seed)
        self._scenes[task] = scene  # last: the most recently used
        while len(self._scenes) > 1 and sum(kept.model.nbuffer for kept in self._scenes.values()) > _MAX_MODEL_BYTES:
            self._scenes.pop(next(iter(self._scenes))).resources.free()
        return scene

    def _load(self, task: Task, seed: int) -> _Scene:
        cells = self.profile.mesh_cells
        model = full_model(task, seed) if cells is None else cached_simplified_model(task, seed, cells)
        model.vis.quality.offsamples = self.profile.multisamples
        model.vis.global_.offwidth = model.vis.global_.offheight = self.size
        drawing = mujoco.MjvScene(model, _MAX_DRAWN_GEOMS)
        drawing.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = self.profile.reflection
        resources = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50)
        return _Scene(model, mujoco.MjData(model), resources, drawing)


@cache
def process_context() -> GLContext:
    """The GL context of this process, made on the first call, for the thread of that call.

    Raises:
        UserError: No back end works.
    """
    return create_context()
