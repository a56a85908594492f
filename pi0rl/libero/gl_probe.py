"""Which GL back ends work here, how fast, and what they draw; each tried in a process of its own.

`python -m pi0rl.libero.gl_probe egl` tries one and prints its figures as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

import mujoco
import numpy as np

from pi0rl.libero.gl import BACKENDS, BackendError, create_backend_context

_TIMEOUT_SECONDS = 60
_SIZE = 256
_FRAMES = 20
# Lit, textured and transparent things that overlap, without shadows as in LIBERO.
_SCENE = """
<mujoco>
  <asset>
    <texture name="checker" type="2d" builtin="checker" rgb1="0.9 0.8 0.6" rgb2="0.3 0.4 0.5" width="64" height="64"/>
    <texture type="skybox" builtin="gradient" rgb1="0.6 0.7 0.9" rgb2="0.1 0.1 0.2" width="64" height="384"/>
    <material name="checker" texture="checker" texrepeat="4 4" specular="0.4"/>
  </asset>
  <worldbody>
    <light pos="1 -1 3" dir="-0.3 0.3 -1" castshadow="false"/>
    <camera name="view" pos="0 -2.2 1.5" xyaxes="1 0 0 0 0.55 0.83"/>
    <geom type="plane" size="2 2 0.1" material="checker"/>
    <geom type="sphere" size="0.4" pos="-0.4 0 0.4" rgba="0.8 0.2 0.2 1"/>
    <geom type="box" size="0.3 0.3 0.3" pos="0.5 0.2 0.3" euler="0 0 30" rgba="0.2 0.6 0.3 1"/>
    <geom type="capsule" size="0.1 0.4" pos="0.1 -0.6 0.5" rgba="0.2 0.3 0.9 0.5"/>
  </worldbody>
</mujoco>
"""


@dataclass(frozen=True)
class BackendProbe:
    """What came of trying a back end.

    Attributes:
        backend: "egl" or "osmesa".
        works: Whether a frame was drawn.
        device: What drew it.
        ms_per_frame: Milliseconds per 256 px frame of a small scene, 4 samples per pixel.
        checksum: 16 hex digits of the frame; equal where two back ends draw the same pixels.
        error: Why it does not work, one line; empty where it does.
    """

    backend: str
    works: bool
    device: str = ""
    ms_per_frame: float = 0.0
    checksum: str = ""
    error: str = ""


def probe_backends() -> tuple[BackendProbe, ...]:
    """Try every back end, each in its own process, so that a crash of one shows as its error line."""
    return tuple(_probe_in_process(backend) for backend in BACKENDS)


def _probe_in_process(backend: str) -> BackendProbe:
    # mujoco itself fails to import with MUJOCO_GL=osmesa where only the wheel's library exists.
    environment = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    command = [sys.executable, "-m", "pi0rl.libero.gl_probe", backend]
    try:
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return BackendProbe(backend, works=False, error=f"no frame within {_TIMEOUT_SECONDS} s")
    if result.returncode:
        lines = result.stderr.strip().splitlines()
        return BackendProbe(backend, works=False, error=lines[-1] if lines else f"ended with {result.returncode}")
    return BackendProbe(**json.loads(result.stdout.splitlines()[-1]))


def _probe(backend: str) -> BackendProbe:
    try:
        context = create_backend_context(backend)
    except BackendError as error:
        return BackendProbe(backend, works=False, error=str(error))
    model = mujoco.MjModel.from_xml_string(_SCENE)
    model.vis.global_.offwidth = model.vis.global_.offheight = _SIZE
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    resources = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50)
    mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, resources)
    scene, view = mujoco.MjvScene(model, 16), mujoco.MjvCamera()
    view.type, view.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, 0
    everything = mujoco.mjtCatBit.mjCAT_ALL.value
    mujoco.mjv_updateScene(model, data, mujoco.MjvOption(), None, view, everything, scene)
    frame = np.empty((_SIZE, _SIZE, 3), np.uint8)
    area = mujoco.MjrRect(0, 0, _SIZE, _SIZE)
    seconds = []
    for _ in range(_FRAMES):
        started = time.perf_counter()
        mujoco.mjr_render(area, scene, resources)
        mujoco.mjr_readPixels(frame, None, area, resources)
        seconds.append(time.perf_counter() - started)
    checksum = hashlib.sha256(frame.tobytes()).hexdigest()[:16]
    return BackendProbe(backend, True, context.device, round(1e3 * float(np.median(seconds)), 2), checksum)


if __name__ == "__main__":
    print(json.dumps(asdict(_probe(sys.argv[1]))))
