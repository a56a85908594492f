"""GL back ends."""

from __future__ import annotations

import pytest

from pi0rl.errors import UserError
from pi0rl.libero.gl import create_context
from pi0rl.libero.gl_probe import probe_backends


def test_every_working_back_end_draws_the_same_pixels():
    probes = probe_backends()
    working = [probe for probe in probes if probe.works]
    assert working, [probe.error for probe in probes]
    assert all(probe.error for probe in probes if not probe.works)
    assert all(probe.ms_per_frame > 0 for probe in working)
    if all("osmesa" in probe.device.lower() or "software" in probe.device for probe in working):
        assert len({probe.checksum for probe in working}) == 1


def test_unknown_back_end_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MUJOCO_GL", "directx")
    with pytest.raises(UserError, match="expected egl or osmesa"):
        create_context()
