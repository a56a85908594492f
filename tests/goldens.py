"""Where the reference arrays are: the full set (``PI0RL_GOLDEN``), or the few that are kept beside the tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FULL = Path(os.environ.get("PI0RL_GOLDEN", TESTS.parent / "../shared/golden/public"))


def golden(path: str) -> Path:
    """A fixture's file or folder; the test is skipped where there is none."""
    for root in (FULL, TESTS / "golden"):
        if (root / path).exists():
            return root / path
    pytest.skip(f"no fixture {path} in {FULL}; set PI0RL_GOLDEN")


def golden_cases(pattern: str) -> list:
    """One test parameter per matching ``<case>.json``, a path without suffix; a skipped one where there is none."""
    for root in (FULL, TESTS / "golden"):
        found = sorted(str(file.relative_to(root).with_suffix("")) for file in root.glob(pattern))
        if found:
            return [pytest.param(case, id=case) for case in found]
    return [pytest.param("", marks=pytest.mark.skip(reason=f"no fixtures {pattern} in {FULL}; set PI0RL_GOLDEN"))]
