"""GL back ends."""

from __future__ import annotations

import os
import subprocess
import sys

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
