"""No golden fixture goes unchecked: every file of the set belongs to a layout that a test is written for."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from goldens import GOLDEN, scan

pytestmark = pytest.mark.golden


def unchecked(root: Path) -> list[str]:
    claimed = {file for fixture in scan(root) for file in fixture.files}
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and path not in claimed)


def test_every_fixture_is_checked() -> None:
    assert GOLDEN.is_dir(), f"no fixtures at {GOLDEN}; set PI0RL_GOLDEN to the folder that holds them"
    assert scan(GOLDEN), f"no fixtures in {GOLDEN}"
    assert unchecked(GOLDEN) == []


def test_every_kind_has_a_test() -> None:
    sources = "".join(file.read_text() for file in Path(__file__).parent.glob("test_golden_*.py"))
    tested = set(re.findall(r'fixtures\("(\w+)"\)', sources))
    assert {fixture.kind for fixture in scan(GOLDEN)} <= tested


def test_fixtures_are_found_by_layout_and_strangers_are_noticed(tmp_path: Path) -> None:
    """Other folder names change nothing; a file that no layout knows, or half a case, is reported."""
    first = next((fixture for fixture in scan(GOLDEN) if fixture.kind == "sampler"), None)
    if first is None:
        pytest.skip(f"no case of a sampler in {GOLDEN}")
    (tmp_path / "deep/er").mkdir(parents=True)
    for file in first.files:
        shutil.copy(file, tmp_path / "deep/er" / file.name)
    assert [fixture.kind for fixture in scan(tmp_path)] == ["sampler"]
    assert unchecked(tmp_path) == []
    shutil.copy(first.path.with_name(first.path.name + ".json"), tmp_path / "deep/er/half.json")
    (tmp_path / "deep/stranger.npz").write_bytes(b"")
    scan.cache_clear()
    assert unchecked(tmp_path) == ["deep/er/half.json", "deep/stranger.npz"]
