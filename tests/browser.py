"""Pages in a headless Chromium; tests that open one skip where there is none."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Literal

import pytest

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"),
)
# Looks at a page as it is shown, with its folded parts open, and writes what it found into it. Colours are painted over
# one another on one pixel, from the outermost background to the text: so whatever notation they are in, they compare.
_LOOK = """
for (const folded of document.querySelectorAll("details")) folded.open = true;
const wanted = SCHEME;
if (isDark() !== (wanted === "dark")) theme.click();
const pixel = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
const paint = (colours) => {
  for (const colour of colours) { pixel.fillStyle = colour; pixel.fillRect(0, 0, 1, 1); }
  return [...pixel.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const luminance = (rgb) => {
  const linear = rgb.map((value) => value / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
};
const backgrounds = (element) => element === null ? [] :
  [...backgrounds(element.parentElement), getComputedStyle(element).backgroundColor];
const faint = [];
for (const element of document.body.querySelectorAll("*:not(script):not(svg *)")) {
  if (![...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())) continue;
  const under = ["white", ...backgrounds(element)];
  const [one, other] = [under, [...under, getComputedStyle(element).color]].map((all) => luminance(paint(all)) + 0.05);
  const contrast = Math.max(one, other) / Math.min(one, other);
  if (contrast < 4.5) faint.push(`${element.className} ${element.textContent}: ${contrast.toFixed(2)}`);
}
const dark_page = luminance(paint(backgrounds(document.body))) < 0.2;
const width = document.documentElement.scrollWidth;
document.body.dataset.seen = JSON.stringify({dark: dark_page, faint, width, window: innerWidth});
"""


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


def require_readable(page: Path, folder: Path, scheme: Literal["light", "dark"]) -> None:
    """Open a report's page on a phone: no complaint, nothing wider than the screen, all text with a contrast of 4.5.

    Args:
        folder: for a copy of the page that says what it looks like, and for the browser's profile.
    """
    copy = folder / f"{scheme}.html"
    look = f"<script>{_LOOK.replace('SCHEME', json.dumps(scheme))}</script></body>"
    copy.write_text(page.read_text().replace("</body>", look))
    flags = ("--window-size=390,844", "--virtual-time-budget=2000")
    done = open_page(copy.as_uri(), folder / f"profile-{scheme}", *flags)
    assert "CONSOLE" not in done.stderr, done.stderr
    # The script ran: it wrote the label of the theme button.
    assert re.search(r'<button id="theme"[^>]*aria-label="Switch to', done.stdout)
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found, "the page did not say what it looks like"
    seen = json.loads(unescape(found[1]))
    assert seen["dark"] == (scheme == "dark")
    assert seen["faint"] == []
    assert seen["width"] <= seen["window"]
