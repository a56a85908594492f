"""No golden fixture goes unchecked: every folder of the set belongs to a test that finds it by its layout."""

from __future__ import annotations

from fnmatch import fnmatch

import pytest
from golden_files import GOLDEN

pytestmark = pytest.mark.golden

CHECKED = {
    "test_golden_policy": ("openpi_tiny*", "rl_sampler*", "rl_sampler*/vlm_value", "vlm_value"),
    "test_golden_processing": (
        "libero_io*",
        "libero_io*/assets/*/*",
        "lerobot_tiny*",
        "lerobot_processor*",
        "lerobot_processor*/tokenizer",
    ),
    "test_golden_rl": ("algos", "algos/adv", "algos/loss"),
    "test_golden_train_step": ("train_step*",),
}


def test_every_fixture_is_checked() -> None:
    if not GOLDEN.is_dir():
        pytest.skip(f"no fixtures at {GOLDEN}; set PI0RL_GOLDEN")
    holding_files = {path.parent.relative_to(GOLDEN).as_posix() for path in GOLDEN.rglob("*") if path.is_file()}
    patterns = [pattern for group in CHECKED.values() for pattern in group]
    unchecked = [folder for folder in sorted(holding_files) if not any(fnmatch(folder, p) for p in patterns)]
    assert not unchecked
