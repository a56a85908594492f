"""Imitation: windows, schedule, determinism (that it learns: test_policy.py)."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from pi0rl.params import SftParams
from pi0rl.policy.checkpoints import save_policy
from pi0rl.policy.config import TINY
from pi0rl.policy.policy import create_policy
from pi0rl.policy.processing import mean_std, tiny_processing
from pi0rl.sft.demonstrations import Demonstrations
from pi0rl.sft.imitation import action_windows, imitate, learning_rate, shift_images

PARAMS = SftParams(steps=30, batch_size=8, warmup_steps=5, lr=3e-3, image_shift=2, num_threads=1)


@pytest.fixture(scope="module")
def demonstrations() -> Demonstrations:
    """Two episodes of 20 steps whose actions are a function of the state."""
    rng = np.random.default_rng(0)
    state = rng.normal(size=(40, 8)).astype(np.float32)
    actions = np.tanh(state[:, :7])
    images = rng.integers(0, 256, size=(2, 40, 64, 64, 3), dtype=np.uint8)
    episode = np.repeat([0, 1], 20).astype(np.int32)
    step = np.tile(np.arange(20), 2).astype(np.int32)
    looks = np.flatnonzero(step % 2 == 0)
    task = np.zeros(40, dtype=np.int32)
    pictures = images[:, looks]
    return Demonstrations(
        pictures[0], pictures[1], looks, state, actions, episode, step, task, ("open the drawer",), {"image_stride": 2}
    )


def train(demonstrations: Demonstrations, seed: int, directory: Path) -> tuple[list[float], bytes]:
    torch.set_num_threads(PARAMS.num_threads)
    processing = tiny_processing(
        TINY, mean_std(demonstrations.state), mean_std(demonstrations.actions), demonstrations.languages
    )
    policy = create_policy(TINY, processing, seed)
    losses = [step.loss for step in imitate(policy, demonstrations, PARAMS, seed)]
    save_policy(policy, directory)
    return losses, (directory / "model.safetensors").read_bytes()


def test_same_seed_same_bytes(demonstrations: Demonstrations, tmp_path: Path) -> None:
    losses, weights = train(demonstrations, 0, tmp_path / "a")
    assert (losses, weights) == train(demonstrations, 0, tmp_path / "b")
    assert weights != train(demonstrations, 1, tmp_path / "c")[1]


def test_windows_end_with_their_episode(demonstrations: Demonstrations) -> None:
    windows = action_windows(demonstrations, horizon=8)
    assert windows.shape == (40, 8, 7)
    np.testing.assert_array_equal(windows[3], demonstrations.actions[3:11])
    np.testing.assert_array_equal(windows[17, :3], demonstrations.actions[17:20])
    np.testing.assert_array_equal(windows[17, 3:], np.repeat(demonstrations.actions[19:20], 5, axis=0))


def test_learning_rate_warms_up_and_decays() -> None:
    rates = [learning_rate(PARAMS, step) for step in range(1, PARAMS.steps + 1)]
    assert rates[0] == pytest.approx(PARAMS.lr / 5)
    assert rates[4] == max(rates) == PARAMS.lr
    assert rates[-1] == pytest.approx(PARAMS.min_lr)
    assert all(later <= earlier for earlier, later in pairwise(rates[4:]))


def test_shifted_images_show_the_same_scene(demonstrations: Demonstrations) -> None:
    observation = demonstrations.observation(demonstrations.looks)
    shifted = shift_images(observation, 2, np.random.default_rng(0))
    assert shifted.base_image.shape == observation.base_image.shape
    for before, after in zip(observation.base_image, shifted.base_image, strict=True):
        places = [(y, x) for y in range(5) for x in range(5)]
        inner = before[4:60, 4:60]
        assert any(np.array_equal(inner, after[2 + y : 58 + y, 2 + x : 58 + x]) for y, x in places)
    np.testing.assert_array_equal(shifted.state, observation.state)
