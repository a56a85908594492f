"""Imitation: windows, schedule, determinism (that it learns: test_policy.py)."""

from __future__ import annotations

import io
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pi0rl.errors import UserError
from pi0rl.params import SftParams
from pi0rl.policy.checkpoints import save_policy
from pi0rl.policy.config import TINY
from pi0rl.policy.policy import FROZEN_PREFIX, Policy, create_policy
from pi0rl.policy.precision import set_precision
from pi0rl.policy.processing import mean_std, tiny_processing
from pi0rl.sft.augmentation import augment
from pi0rl.sft.demonstrations import Demonstrations, normalisation, split
from pi0rl.sft.imitation import Imitation, action_windows, imitate, learnable_looks, learning_rate, shift_images

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
    pictures, disturbed = images[:, looks], np.zeros(40, dtype=bool)
    card = {"image_stride": 2, "norm_stats": {"state": normalisation(state), "actions": normalisation(actions)}}
    return Demonstrations(
        pictures[0], pictures[1], looks, state, actions, episode, step, task, disturbed, ("open the drawer",), card
    )


def fresh_policy(demonstrations: Demonstrations, seed: int) -> Policy:
    torch.set_num_threads(PARAMS.num_threads)
    processing = tiny_processing(
        TINY, mean_std(demonstrations.state), mean_std(demonstrations.actions), demonstrations.languages
    )
    return create_policy(TINY, processing, seed)


def training(demonstrations: Demonstrations, **changes: Any) -> tuple[Policy, Imitation]:
    """A fresh policy and its training with other params."""
    policy = fresh_policy(demonstrations, 0)
    policy.trainable_parameters(changes.get("train_expert_only", False))
    return policy, Imitation(policy, demonstrations, PARAMS.model_copy(update=changes), seed=0)


def test_chunks_with_a_disturbed_step_are_not_imitated(demonstrations: Demonstrations) -> None:
    np.testing.assert_array_equal(learnable_looks(demonstrations, 8), demonstrations.looks)
    disturbed = np.isin(np.arange(40), [9, 39])  # within the first episode, and the second one's last step
    noisy = replace(demonstrations, disturbed=disturbed)
    np.testing.assert_array_equal(learnable_looks(noisy, 8), [0, *range(10, 32, 2)])
    with pytest.raises(UserError, match="18 steps between two disturbances; a policy that predicts 19 actions"):
        learnable_looks(noisy, 19)
    with pytest.raises(UserError, match="of 20 looks none is followed by 8 undisturbed steps"):
        learnable_looks(replace(demonstrations, disturbed=np.ones(40, bool)), 8)


def weights(policy: Policy) -> torch.Tensor:
    return torch.cat([weight.detach().float().flatten() for weight in policy.parameters()])


def train(demonstrations: Demonstrations, seed: int, directory: Path) -> tuple[list[float], bytes]:
    policy = fresh_policy(demonstrations, seed)
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


def test_a_stopped_training_goes_on_to_the_same_bytes(demonstrations: Demonstrations) -> None:
    changes = {"ema_decay": 0.9, "augmentation": "openpi", "gradient_accumulation": 2}
    whole_policy, whole = training(demonstrations, **changes)
    losses = [whole.step().loss for _ in range(6)]
    _, first = training(demonstrations, **changes)
    assert [first.step().loss for _ in range(3)] == losses[:3]
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    policy, second = training(demonstrations, **changes)
    second.restore(torch.load(file, weights_only=True))
    assert [second.step().loss for _ in range(3)] == losses[3:]
    with whole.averaged(), second.averaged():
        assert torch.equal(weights(policy), weights(whole_policy))


def test_parts_of_a_batch_make_the_same_step(demonstrations: Demonstrations) -> None:
    (one, whole), (other, parted) = training(demonstrations), training(demonstrations, gradient_accumulation=4)
    first, second = whole.step(), parted.step()
    assert second.loss == pytest.approx(first.loss, rel=1e-5)
    assert second.grad_norm == pytest.approx(first.grad_norm, rel=1e-4)
    assert (weights(one) - weights(other)).abs().mean() < 1e-5


def test_the_moving_average_is_one(demonstrations: Demonstrations) -> None:
    policy, averaging = training(demonstrations, ema_decay=0.75)
    expected = weights(policy)
    for _ in range(3):
        averaging.step()
        expected = 0.75 * expected + 0.25 * weights(policy)
    current = weights(policy)
    with averaging.averaged():
        torch.testing.assert_close(weights(policy), expected)
    assert torch.equal(weights(policy), current)


def test_the_moving_average_of_bfloat16_weights_moves(demonstrations: Demonstrations) -> None:
    policy = fresh_policy(demonstrations, 0)
    set_precision(policy, "bf16")
    policy.trainable_parameters(False)
    averaging = Imitation(policy, demonstrations, PARAMS.model_copy(update={"ema_decay": 0.99}), seed=0)
    start = expected = weights(policy)
    for _ in range(10):
        averaging.step()
        expected = 0.99 * expected + 0.01 * weights(policy)
    with averaging.averaged():
        torch.testing.assert_close(weights(policy), expected, rtol=2**-8, atol=0)
        assert not torch.equal(weights(policy), start)


def test_expert_only_leaves_the_vlm_alone(demonstrations: Demonstrations) -> None:
    policy, trained = training(demonstrations, train_expert_only=True)
    before = {name: weight.detach().clone() for name, weight in policy.named_weights().items()}
    trained.step()
    trained.step()
    changed = {name for name, weight in policy.named_weights().items() if not torch.equal(weight, before[name])}
    assert changed
    assert not any(name.startswith(FROZEN_PREFIX) for name in changed)


def test_mixed_precision_stays_close(demonstrations: Demonstrations) -> None:
    _, exact = training(demonstrations)
    _, mixed = training(demonstrations, mixed_precision=True)
    for _ in range(3):
        one, other = exact.step(), mixed.step()
    assert other.loss == pytest.approx(one.loss, rel=0.02)
    assert other.loss != one.loss


def test_demonstrations_are_split_by_episode(demonstrations: Demonstrations) -> None:
    assert split(demonstrations, None, 0)[0] is demonstrations
    few, held_out = split(demonstrations, 1, 1)
    assert (set(few.episode), set(held_out.episode)) == ({0}, {1})
    np.testing.assert_array_equal(held_out.actions, demonstrations.actions[20:])
    np.testing.assert_array_equal(held_out.looks, np.arange(0, 20, 2))
    before, after = demonstrations.observation(np.array([24])), held_out.observation(np.array([4]))
    np.testing.assert_array_equal(after.base_image, before.base_image)
    np.testing.assert_allclose(few.card["norm_stats"]["state"]["mean"], demonstrations.state[:20].mean(0), rtol=1e-5)
    with pytest.raises(UserError, match="2 episodes, 2 to train on and 1 held out were asked for"):
        split(demonstrations, 2, 1)


def test_validation_loss_moves_only_with_the_weights(demonstrations: Demonstrations) -> None:
    few, held_out = split(demonstrations, 1, 1)
    (_, measured), (_, unmeasured) = training(few), training(few)
    before = [measured.validation_loss(few), measured.validation_loss(held_out)]
    assert measured.validation_loss(held_out) == before[1]
    assert [measured.step().loss for _ in range(20)] == [unmeasured.step().loss for _ in range(20)]
    assert measured.validation_loss(few) < before[0]
    assert measured.validation_loss(held_out) != before[1]


def test_augmented_pictures_are_openpis(demonstrations: Demonstrations) -> None:
    ramp = torch.linspace(-0.5, 0.5, 64)
    images = ramp.expand(200, 2, 3, 64, 64).clone()
    changed = augment(images, torch.Generator().manual_seed(0))
    assert changed.shape == images.shape
    assert changed.abs().max() <= 1
    assert torch.equal(changed, augment(images, torch.Generator().manual_seed(0)))
    wrist = changed[:, 1]
    assert torch.equal(wrist[:, :, :1].expand_as(wrist), wrist)  # columns stay columns: only colours change
    assert not torch.equal(changed[:, 0, :, :1].expand_as(wrist), changed[:, 0])
    brightness = (wrist.mean((1, 2, 3)) + 1) / (images[0, 1].mean() + 1)
    assert 0.7 <= brightness.min() < 0.75
    assert 1.2 < brightness.max() <= 1.31
