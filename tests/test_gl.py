"""GL back ends."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from typing import Any

import pytest

from pi0rl.errors import UserError
from pi0rl.libero import gl
from pi0rl.libero.gl_probe import probe_backends


def test_every_working_back_end_draws_the_same_pixels():
    probes = probe_backends()
    working = [probe for probe in probes if probe.works]
    assert working, [probe.error for probe in probes]
    assert all(probe.error for probe in probes if not probe.works)
    assert all(probe.ms_per_frame > 0 for probe in working)
    if all("osmesa" in probe.device.lower() or "software" in probe.device for probe in working):
        assert len({probe.checksum for probe in working}) == 1


def test_unknown_back_end_is_one_clear_error():
    program = (
        "from pi0rl.libero.rendering import process_context\n"
        "from pi0rl.errors import UserError\n"
        "try: process_context()\n"
        "except UserError as error: print(error)"
    )
    environment = os.environ | {"MUJOCO_GL": "directx"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "expected egl or osmesa" in done.stdout


@pytest.fixture
def four_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """EGL as on a machine with three GPUs, which it lists in another order than CUDA, and a software device."""

    def query(room: int, handles: Any, count: Any) -> bool:
        for index in range(4):
            handles[index] = 100 + index
        ctypes.cast(count, ctypes.POINTER(ctypes.c_int))[0] = 4
        return True

    monkeypatch.setattr(gl, "_egl_function", lambda *_: query)
    monkeypatch.setattr(gl, "_cuda_index", lambda _, handle: {100: 2, 101: 0, 102: 1, 103: None}[handle])
    for name in ("CUDA_VISIBLE_DEVICES", "MUJOCO_EGL_DEVICE_ID"):
        monkeypatch.setenv(name, "")  # so that it is put back even where it was not set
        monkeypatch.delenv(name)


def order() -> list[int]:
    return [index for index, _ in gl._egl_devices(ctypes.CDLL(None))]


@pytest.mark.usefixtures("four_devices")
def test_the_device_is_chosen_by_cuda_s_number_or_egl_s(monkeypatch: pytest.MonkeyPatch) -> None:
    assert order() == [0, 1, 2, 3]
    for visible, expected in (("1", [2, 0, 1, 3]), ("0,2", [0, 1, 2, 3]), ("", [3, 0, 1, 2]), ("GPU-5f", [0, 1, 2, 3])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert order() == expected
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "2")
    assert order() == [2]
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "4")
    with pytest.raises(UserError, match="MUJOCO_EGL_DEVICE_ID=4: expected 0 to 3"):
        order()


@pytest.mark.usefixtures("four_devices")
def test_a_worker_renders_on_the_gpu_of_its_placement(monkeypatch: pytest.MonkeyPatch) -> None:
    for visible, gpu, first in ((None, 1, 2), ("", 0, 1), ("2,0", 0, 0), ("2,0", 1, 1)):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        gl.prefer_gpu(gpu)
        assert order()[0] == first
