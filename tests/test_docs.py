"""The site builds strictly (every internal link resolves), stands alone, and says the same in both languages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pi0rl.evaluation.protocols import PROTOCOLS
from pi0rl.tracking.metrics import METRICS

ROOT = Path(__file__).parents[1]
# What a browser would fetch by itself: not where links lead.
_FETCHED = re.compile(r"<(?:script|img|source|iframe|video)[^>]* src=\"([^\"]+)\"|<link[^>]* href=\"([^\"]+)\"")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]  # --quiet hides warnings
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def test_the_site_asks_nothing_of_other_servers(site: Path) -> None:
    pages = [page for page in site.rglob("*.html") if "reports" not in page.parts]
    assert len(pages) > 20
    for page in pages:
        for match in _FETCHED.finditer(page.read_text()):
            address = match[1] or match[2]
            assert "//" not in address, f"{page.name} fetches {address}"
            if page.name != "404.html":  # its addresses are those of the server's root
                assert (page.parent / address.partition("?")[0]).exists(), f"{page.name}: no {address}"
    assert not any("@import" in sheet.read_text() for sheet in site.rglob("*.css"))


def test_pages_say_their_language(site: Path) -> None:
    for page, language in (("index.html", "en"), ("index.zh-CN.html", "zh-CN"), ("quickstart.zh-CN.html", "zh-CN")):
        assert re.findall(r"<html[^>]* lang=\"([^\"]+)\"", (site / page).read_text()) == [language]


def test_pages_link_to_files_that_git_holds() -> None:
    # A file that only this checkout has builds here, and nowhere else.
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    held = {ROOT / name for name in listed.stdout.split("\0")}
    for page in [*ROOT.glob("README*.md"), *(ROOT / "docs").rglob("*.md")]:
        links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
        files = [(page.parent / link).resolve() for link in links if "://" not in link]
        assert [str(file) for file in files if file.is_file() and file not in held] == [], page


def test_the_reference_holds_every_name(site: Path) -> None:
    params = (site / "reference" / "params.html").read_text()
    for key in ("num_action_chunks", "logger_backends", "component_placement", "target_kl", "episodes_per_task"):
        assert f"<code>{key}</code>" in params
    metrics = (site / "reference" / "metrics.html").read_text()
    assert all(name.replace("<", "&lt;").replace(">", "&gt;") in metrics for name in METRICS)
    protocols = (site / "reference" / "protocols.html").read_text()
    assert all(protocol.hash in protocols for protocol in PROTOCOLS)
    assert "pi0rl checkpoint convert" in (site / "reference" / "cli.html").read_text()
    assert "def wilson_interval(" in re.sub(r"<[^>]+>", "", (site / "reference" / "python.html").read_text())


def test_benchmark_pages_hold_what_was_measured(site: Path) -> None:
    page = (site / "benchmarks.html").read_text()
    for results in (ROOT / "benchmarks" / "results").glob("*.md"):
        measured = re.findall(r"\d+\.\d+", results.read_text())
        assert measured
        assert all(number in page for number in measured)


@pytest.mark.parametrize(
    ("english", "chinese"),
    [("README.md", "README.zh-CN.md"), ("docs/quickstart.md", "docs/quickstart.zh-CN.md")],
)
def test_both_languages_say_the_same_numbers_and_commands(english: str, chinese: str) -> None:
    one, other = ((ROOT / name).read_text(encoding="utf-8") for name in (english, chinese))
    assert _commands(one) == _commands(other)
    tables = [
        [re.findall(r"\d[\d.e/-]*", line) for line in text.splitlines() if line[:1] == "|"] for text in (one, other)
    ]
    assert tables[0] == tables[1]
    assert _numbers(one) == _numbers(other)


def _commands(text: str) -> list[str]:
    blocks = re.findall(r"^```(?:bash|python)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [re.sub(r"<[^>]*>", "<>", line) for line in lines if line and not line.startswith("#")]


def _numbers(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w.])\d+(?:\.\d+)*(?!\w|\.\d)", re.sub(r"`[^`]*`", "", text)))
