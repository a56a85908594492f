"""The doctor's checks of files: what is as published, and what has been changed since."""

from __future__ import annotations

from pathlib import Path

import pytest

from pi0rl import doctor
from pi0rl.doctor import SUITE_FILES, changed_files, suite_hash
from pi0rl.libero.gl_probe import BackendProbe
from pi0rl.libero.suites import SUITES


def test_every_suite_is_as_published() -> None:
    assert {suite: suite_hash(suite) for suite in SUITES} == SUITE_FILES


def test_changed_and_missing_files_of_a_package_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    information = tmp_path / "sample-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: sample\nVersion: 1.0\n")
    of_abc = "sha256=ungWv48Bz-pBQUDeXa4iI7ADYaOWF3qctBD_YfIAFa0"  # FIPS 180-2, example B.1
    names = ("same.txt", "changed.txt", "missing.txt")
    (information / "RECORD").write_text("".join(f"{name},{of_abc},3\n" for name in names) + "compiled.pyc,,\n")
    (tmp_path / "same.txt").write_text("abc")
    (tmp_path / "changed.txt").write_text("abd")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert changed_files("sample") == {"same.txt": False, "changed.txt": True, "missing.txt": True}


@pytest.mark.parametrize("forced", ["osmesa", "glfw"])
def test_a_forced_back_end_that_does_not_work_fails(forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    probes = (BackendProbe("egl", works=True), BackendProbe("osmesa", works=False, error="no libOSMesa"))
    monkeypatch.setattr(doctor, "probe_backends", lambda: probes)
    monkeypatch.setenv("PI0RL_GL", forced)  # what MUJOCO_GL was when pi0rl.libero was imported
    checks = {check.name: check for check in doctor._rendering()}
    assert checks["rendering"].ok is False
    assert f"MUJOCO_GL={forced}" in checks["rendering"].finding
    assert "unset MUJOCO_GL" in checks["rendering"].advice
