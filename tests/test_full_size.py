"""The 3.3 B-parameter pi0 with random weights: memory, speed and outputs. Minutes, 7 GB of disk."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import psutil
import pytest

from benchmarks.policy import WAYS, build_full, in_fresh_process, measure_full, seconds
from pi0rl.policy.config import PI0
from pi0rl.policy.memory import MemoryConfig, predict
from pi0rl.policy.sampling import SamplerConfig

GIB = 2**30
NEEDED_GIB = 11
PROCESS_GIB = 0.4


@pytest.mark.slow
def test_the_full_model_loads_acts_and_learns(tmp_path: Path) -> None:
    available = psutil.virtual_memory().available / GIB
    if available < NEEDED_GIB:
        pytest.skip(f"{available:.0f} GiB of memory available, {NEEDED_GIB} needed")
    build = in_fresh_process(build_full, tmp_path / "pi0")
    assert 3.2e9 < build["parameters"] < 3.3e9
    assert build["peak_gib"] < 20
    result = in_fresh_process(measure_full, tmp_path / "pi0")
    assert result["after_loading"]["own_gib"] < 1.0  # the weights are in the mapped file
    assert result["peak_gib"] < 20
    assert result["step"]["taken"]
    assert result["step"]["changed"] > 0
    optimised, all_tokens, _ = WAYS
    for what in ("look", "training step"):
        pairs = zip(seconds(result, all_tokens, what), seconds(result, optimised, what), strict=True)
        assert median(slow / fast for slow, fast in pairs) > 1.3
    apart = next(row for row in result["rows"] if row["way"] == all_tokens.name)
    assert apart["actions"] < 5e-2  # the references' tolerance for bfloat16
    sampler = SamplerConfig("flow_sde", num_steps=10, action_chunk=5)
    config = MemoryConfig(
        PI0, None, None, sampler, "bf16", True, False, look_batch=1, micro_batch=1, language=16, gpu=False
    )
    memory = predict(config)
    predicted = (memory.weights + memory.gradients + memory.optimizer + memory.update) / GIB + PROCESS_GIB
    assert result["step_peak_gib"] == pytest.approx(predicted, rel=0.25)
