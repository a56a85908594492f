"""Copied by scripts/setup to robosuite/macros_private.py, which robosuite reads first when it is imported."""

import ctypes
import os

import robosuite.macros

# /tmp/robosuite.log cannot be opened where another user has made it
robosuite.macros.FILE_LOGGING_LEVEL = None

try:
    ctypes.CDLL("libEGL.so.1")
except OSError:
    # Without EGL the import would fail; LIBERO is only asked for its models, and pi0rl draws through OSMesa
    robosuite.macros.MUJOCO_GPU_RENDERING = False
    os.environ.setdefault("MUJOCO_GL", "disable")
