"""LIBERO, exact and fast; usable alone, without Ray, torch or the rest of pi0rl."""

import os

from gymnasium.envs.registration import register

# MuJoCo imports a GL library as soon as it sees MUJOCO_GL, and dies with a traceback where that fails. We make our own
# contexts (gl.py), later and with a clear error; so the user's wish is kept under another name until then.
if "MUJOCO_GL" in os.environ:
    os.environ["PI0RL_GL"] = os.environ.pop("MUJOCO_GL")

register(
    "pi0rl/Libero-v0",
    entry_point="pi0rl.libero.env:LiberoEnv",
    vector_entry_point="pi0rl.libero.vector_env:LiberoVectorEnv",
)
