"""Pages in a headless Chromium; tests that open one skip where there is none."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"),
)


def chromium() -> str:
    """The browser's program."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    # where Ubuntu has no snaps, its chromium-browser only says that it is one
    if found is None or subprocess.run([found, "--version"], capture_output=True).returncode != 0:
        pytest.skip("no Chromium on this machine")
    return found


def open_page(url: str, profile: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Open ``url`` with a new profile in ``profile``; stdout is the page's DOM, stderr holds what the console said."""
    command = [chromium(), *_FLAGS, f"--user-data-dir={profile}", *flags, "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
