"""LIBERO, exact and fast; usable alone, without Ray, torch or the rest of pi0rl."""

import os

# MuJoCo imports a GL library as soon as it sees MUJOCO_GL, and dies with a traceback where that fails. We make our own
# contexts (gl.py), later and with a clear error; so the user's wish is kept under another name until then.
if "MUJOCO_GL" in os.environ:
    os.environ["PI0RL_GL"] = os.environ.pop("MUJOCO_GL")
