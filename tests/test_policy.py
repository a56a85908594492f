"""The tiny policy: bits, noise, sampling modes, heads, what is trained, what the processing does to an observation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_policies import PREFIX_CRITIC, SDE, D, H, K, make_policy, noise_for, observe, pick

from pi0rl.policy.action_tokens import bin_centres, bins
from pi0rl.policy.config import TINY
from pi0rl.policy.critic import CriticConfig, NoiseHeadConfig, Pooling
from pi0rl.policy.model import concatenate
from pi0rl.policy.policy import create_policy, with_heads
from pi0rl.policy.processing import Normalisation
from pi0rl.policy.sampling import SamplerConfig, SamplingNoise, episode_noise, evaluate_chains, sample
from pi0rl.policy.tokenizer import LIBERO_WORDS, WordTokenizer


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("batch", [1, 3, 8, 10, 16])
def test_a_row_does_not_depend_on_its_batch(batch: int) -> None:
    policy, looks = make_policy(PREFIX_CRITIC), observe(24)
    inputs = policy.processing.inputs(looks)
    alone = sample(policy, inputs, noise_for(range(24)), SDE, "train")
    for trial in range(4):
        rows = np.random.default_rng(trial).permutation(24)[:batch]
        shared = sample(policy, policy.processing.inputs(pick(looks, rows)), noise_for(rows), SDE, "train")
        for name in ("actions", "chains", "log_probs", "values"):
            assert torch.equal(getattr(shared, name), getattr(alone, name)[rows]), name


def test_noise_is_a_function_of_its_indices() -> None:
    indices = (1, 2, 3, 4, 5)
    first = episode_noise(*indices, shape=(K + 1, H, D))
    again = episode_noise(*indices, shape=(K + 1, H, D))
    np.testing.assert_array_equal(first.normal, again.normal)
    assert first.uniform == again.uniform
    for changed in range(5):
        other = episode_noise(*(n + (i == changed) for i, n in enumerate(indices)), shape=(K + 1, H, D))
        assert abs(np.corrcoef(first.normal.ravel(), other.normal.ravel())[0, 1]) < 0.25
    many = np.stack([episode_noise(0, 0, 0, e, 0, (K + 1, H, D)).normal for e in range(200)])
    assert abs(many.mean()) < 0.01
    assert abs(many.std() - 1) < 0.01


@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
@pytest.mark.parametrize(
    ("method", "stochastic"),
    [("flow_sde", "single"), ("flow_sde", "all"), ("flow_sde", "joint"), ("flow_cps", "all"), ("flow_noise", "joint")],
)
def test_training_recovers_the_rollout(method: str, stochastic: str, pi05: bool) -> None:
    """With unchanged weights, stored chains get the log-probs and values they were drawn with."""
    critic = CriticConfig("expert", (32,), matches_rollout=True)
    policy = make_policy(critic, NoiseHeadConfig(hidden=(16,)), pi05)
    config = SamplerConfig(method, num_steps=K, action_chunk=5, stochastic=stochastic)
    inputs = policy.processing.inputs(observe(8))
    drawn = sample(policy, inputs, noise_for(range(8)), config, "train")
    kept = {"single": 1, "all": K, "joint": 1}[stochastic]
    assert drawn.log_probs.shape == (8, kept, 5, 7)
    assert drawn.chains.shape == (8, K + 1, H, D)
    with torch.no_grad():
        prefix = policy.prefix(inputs)
    for source in (inputs, prefix):
        result = evaluate_chains(policy, source, drawn.chains, drawn.denoise_inds, config)
        torch.testing.assert_close(result.log_probs, drawn.log_probs, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(result.values, drawn.values, atol=1e-5, rtol=1e-5)
    if stochastic == "single":
        assert len(drawn.denoise_inds.unique()) > 1  # every observation draws its own step


def test_evaluation_is_the_ode() -> None:
    policy, noise = make_policy(), noise_for(range(8))
    inputs = policy.processing.inputs(observe(8))
    drawn = sample(policy, inputs, noise, SDE, "eval")
    other = SamplingNoise(noise.initial, torch.randn_like(noise.steps), noise.uniform)
    assert torch.equal(drawn.actions, sample(policy, inputs, other, SDE, "eval").actions)
    assert not drawn.log_probs.any()
    assert (drawn.denoise_inds == -1).all()


def test_a_cached_prefix_trains_the_expert_only() -> None:
    policy = make_policy(PREFIX_CRITIC)
    trainable = policy.trainable_parameters(train_expert_only=True)
    assert not any(name.startswith("paligemma_with_expert.paligemma.") for name in trainable)
    inputs = policy.processing.inputs(observe(16))
    drawn = sample(policy, inputs, noise_for(range(16)), SDE, "train")
    with torch.no_grad():
        halves = [policy.prefix(inputs.rows(torch.arange(i, i + 8))) for i in (0, 8)]
    rows = torch.tensor([9, 2, 4, 15])
    gradients = []
    for source in (concatenate(halves).rows(rows), inputs.rows(rows)):
        policy.zero_grad()
        result = evaluate_chains(policy, source, drawn.chains[rows], drawn.denoise_inds[rows], SDE)
        (result.log_probs.mean() + result.values.mean()).backward()
        gradients.append({name: parameter.grad for name, parameter in trainable.items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-3, msg=name)


def test_imitation_learns() -> None:
    """A few steps on one batch bring the loss well below that of predicting nothing."""
    policy = create_policy(TINY, make_policy().processing, 0)
    inputs, generator = policy.processing.inputs(observe(16)), torch.Generator().manual_seed(0)
    actions = torch.randn(16, H, D, generator=generator)
    noise, time = torch.randn(16, H, D, generator=generator), torch.rand(16, generator=generator)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        loss = policy.model.flow_matching_loss(inputs, actions, noise, time).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    torch.testing.assert_close(losses[0], float((noise - actions).square().mean()))
    assert losses[-1] < 0.5 * losses[0]


def test_heads_are_exchanged_around_the_same_network() -> None:
    policy = make_policy(PREFIX_CRITIC)
    kept = with_heads(policy, PREFIX_CRITIC, None, seed=1)
    assert kept.model is policy.model
    assert kept.value_head is policy.value_head
    wide = replace(PREFIX_CRITIC, hidden=(64,))
    fresh = with_heads(policy, wide, NoiseHeadConfig(), seed=1)
    again = with_heads(policy, wide, NoiseHeadConfig(), seed=1)
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), again.state_dict().values(), strict=True))


def test_images_are_rotated_by_180_degrees_once() -> None:
    processing, looks = make_policy().processing, observe(2)
    images = processing.inputs(looks).images
    assert images.shape == (2, 2, 3, 64, 64)
    for camera, raw in enumerate((looks.base_image, looks.wrist_image)):
        expected = torch.from_numpy(np.rot90(raw, 2, axes=(1, 2)).copy()).permute(0, 3, 1, 2) / 255.0 * 2.0 - 1.0
        assert torch.equal(images[:, camera], expected)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("method", ["mean_std", "quantile"])
@pytest.mark.parametrize("convention", ["openpi", "lerobot"])
def test_actions_return_through_the_processing(delta: bool, method: str, convention: str) -> None:
    rng = np.random.default_rng(0)
    norm = Normalisation(method, tuple(rng.normal(size=7) - 2), tuple(rng.random(7) + 3), convention)
    processing = replace(make_policy().processing, action_norm=norm, delta_actions=delta, action_dim=32)
    looks, actions = observe(4), rng.uniform(-1, 1, (4, H, 7))
    targets = processing.targets(actions, looks.state)
    assert targets.shape == (4, H, 32)
    np.testing.assert_allclose(processing.env_actions(targets, looks), actions, atol=1e-5)


def test_words_and_bins() -> None:
    tokenizer = WordTokenizer()
    ids = tokenizer.encode("Put BOTH moka pots\n on the spaceship")
    assert ids[4] == tokenizer.NEWLINE_ID
    assert ids[-1] == tokenizer.UNKNOWN_ID
    assert len(set(ids)) == len(ids)
    assert max(tokenizer.encode(" ".join(LIBERO_WORDS))) < tokenizer.vocab_size <= TINY.vocab_size
    state = np.linspace(-1, 0.999, 500)
    np.testing.assert_allclose(bin_centres(bins(state)), state, atol=1 / 256)
    assert bins(np.array([-1.5, 1.5])).tolist() == [-1, 255]


@pytest.mark.parametrize(("pooling", "absent"), [("mean_token", True), ("last_token", True), ("mean_valid", False)])
def test_a_critic_on_masked_tokens_is_given_them(pooling: Pooling, absent: bool) -> None:
    policy = with_heads(make_policy(), CriticConfig(source="prefix", hidden=(8,), pooling=pooling), None, seed=0)
    assert policy.processing.absent_camera == absent
    assert not with_heads(policy, None, None, seed=0).processing.absent_camera
