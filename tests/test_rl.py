"""The learning, on hand-made trajectories: invariants, guards, resuming."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Normal

from pi0rl.errors import UserError
from pi0rl.observation import Observation
from pi0rl.rl import losses
from pi0rl.rl.advantages import Batch, Reference, gae, group_advantages, kept_groups, make_batch, valid_mask
from pi0rl.rl.config import AlgorithmConfig, OptimConfig, RewardConfig, UpdateConfig, watched_kl
from pi0rl.rl.metrics import rollout_metrics
from pi0rl.rl.optimizer import PolicyOptimizer
from pi0rl.rl.schedules import adam_warmup_factor, learning_rate_factor
from pi0rl.rl.trajectories import Rollout, Trajectory, shape_rewards, step_dones
from pi0rl.rl.update import Evaluation, UpdateReport, micro_batches, minibatches, update

CHUNK, MAX_STEPS = 3, 12
PPO = AlgorithmConfig(ratio_tolerance=1e-5)
GRPO = AlgorithmConfig(adv_type="grpo", loss_type="actor", group_size=4)


def trajectory(episode: int, success_step: int | None, group: int = 0) -> Trajectory:
    """An episode that succeeds after ``success_step`` steps, or never; its numbers depend on its index only."""
    rng = np.random.default_rng(episode)
    steps = min(success_step or MAX_STEPS, MAX_STEPS)
    chunks = -(-steps // CHUNK)
    success = np.zeros((chunks, CHUNK), dtype=bool)
    if success_step is not None and success_step <= MAX_STEPS:
        success.reshape(-1)[success_step - 1 :] = True
    image = np.full((chunks, 2, 2, 3), episode, dtype=np.uint8)
    return Trajectory(
        episode=episode,
        group=group,
        simulated=steps,
        rewards=shape_rewards(success, RewardConfig()),
        success=success,
        dones=step_dones(success, MAX_STEPS),
        log_probs=rng.normal(size=(chunks, 2, CHUNK, 7)).astype(np.float32),
        values=rng.normal(size=chunks).astype(np.float32),
        chains=rng.normal(size=(chunks, 5, CHUNK, 8)).astype(np.float32),
        denoise_inds=np.tile([1, 3], (chunks, 1)),
        observation=Observation(image, image, np.arange(chunks * 8.0).reshape(chunks, 8), ("push",) * chunks),
    )


def episodes() -> list[Trajectory]:
    outcomes = [4, None, 9, 1, None, 12, 3, 7]
    return [trajectory(index, outcome, group=index // 4) for index, outcome in enumerate(outcomes)]


# --- rewards and masks ---


def test_rewards_pay_the_first_success_once() -> None:
    success = np.array([[0, 0, 1], [0, 1, 1]], dtype=bool)
    assert shape_rewards(success, RewardConfig(reward_coef=5.0)).tolist() == [[0, 0, 5], [0, 0, 0]]
    assert shape_rewards(success, RewardConfig(latch_success=False)).tolist() == [[0, 0, 1], [-1, 1, 0]]
    penalty = RewardConfig(use_rel_reward=False, use_step_penalty=True)
    assert shape_rewards(success, penalty).tolist() == [[-1, -1, 0], [0, 0, 0]]


def test_the_step_that_succeeds_is_the_last_valid_one() -> None:
    success = np.array([[0, 0, 0], [0, 1, 1], [1, 0, 1]], dtype=bool)
    dones = torch.zeros(4, 1, 3, dtype=torch.bool)
    dones[1:, 0] = torch.from_numpy(step_dones(success, max_episode_steps=9))
    assert valid_mask(dones)[:, 0].int().tolist() == [[1, 1, 1], [1, 1, 0], [0, 0, 0]]


def test_a_trajectory_must_end() -> None:
    whole = trajectory(0, success_step=None)
    with pytest.raises(ValueError, match="not done"):
        replace(whole, dones=np.zeros_like(whole.dones))


# --- advantages ---


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_discounted_sum_of_the_errors(seed: int, horizon: int, gamma: float, gae_lambda: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(horizon, 2, generator=generator)
    values = torch.randn(horizon + 1, 2, generator=generator)
    dones = torch.rand(horizon + 1, 2, generator=generator) < 0.2
    advantages, returns = gae(rewards, values, dones, gamma, gae_lambda)
    for b in range(2):
        for start in range(horizon):
            total, discount = 0.0, 1.0
            for t in range(start, horizon):
                going_on = not dones[t + 1, b]
                total += discount * float(rewards[t, b] + gamma * values[t + 1, b] * going_on - values[t, b])
                discount *= gamma * gae_lambda
                if not going_on:
                    break
            assert float(advantages[start, b]) == pytest.approx(total, abs=1e-4)
            assert float(returns[start, b]) == pytest.approx(total + float(values[start, b]), abs=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-40, 40), min_size=1, max_size=12), st.integers(2, 4))
def test_group_advantages_sum_to_zero(eighths: list[int], count: int) -> None:
    groups = torch.arange(len(eighths)) % count
    # scores that differ by rounding alone would have the rounding of their mean divided by next to nothing
    advantages = group_advantages(torch.tensor(eighths) / 8, groups)
    for group in groups.unique():
        assert float(advantages[groups == group].sum()) == pytest.approx(0.0, abs=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(8)), st.sampled_from([PPO, GRPO, replace(PPO, loss_agg_func="trajectory-mean")]))
def test_the_order_of_arrival_changes_nothing(order: list[int], config: AlgorithmConfig) -> None:
    finished = episodes()
    batch = make_batch(Rollout(finished), config, MAX_STEPS)
    shuffled = Rollout([finished[index] for index in order])
    again = make_batch(shuffled, config, MAX_STEPS)
    for name in ("samples", "log_probs", "advantages", "mask", "values", "returns", "weights"):
        before, after = getattr(batch, name), getattr(again, name)
        assert before is after is None or torch.equal(before, after), name
    assert np.array_equal(shuffled.inputs([5, 0]).chains, Rollout(finished).inputs([5, 0]).chains)


def test_ragged_episodes_get_the_advantages_of_padded_ones() -> None:
    """Leaving out what comes after the end changes neither the normalisation nor any advantage."""
    finished = episodes()
    packed = make_batch(Rollout(finished), PPO, MAX_STEPS)
    padded = [pad(episode) for episode in finished]
    kept = make_batch(Rollout(padded), replace(PPO, compat="rlinf"), MAX_STEPS)
    valid = kept.mask[:, 0]
    assert int(valid.sum()) == len(packed) < len(kept)
    assert torch.equal(kept.advantages[valid], packed.advantages)
    assert torch.equal(kept.log_probs[valid], packed.log_probs)


def pad(episode: Trajectory) -> Trajectory:
    """The same episode with arbitrary chunks after its end, as RLinf collects it."""
    extra = MAX_STEPS // CHUNK - len(episode)

    def longer(array: np.ndarray) -> np.ndarray:
        return np.concatenate([array, np.repeat(array[-1:], extra, axis=0)])

    look = episode.observation
    rewards = longer(episode.rewards)
    rewards[len(episode) :] = 0.0
    return replace(
        episode,
        rewards=rewards,
        success=longer(episode.success),
        dones=longer(episode.dones),
        log_probs=longer(episode.log_probs),
        values=longer(episode.values),
        chains=longer(episode.chains),
        denoise_inds=longer(episode.denoise_inds),
        observation=Observation(
            longer(look.base_image), longer(look.wrist_image), longer(look.state), look.prompt + ("push",) * extra
        ),
    )


def test_uninformative_groups_are_left_out() -> None:
    finished = [trajectory(index, 3 if index < 6 else None, group=index // 4) for index in range(8)]
    batch = make_batch(Rollout(finished), replace(GRPO, filter_rewards=True), MAX_STEPS)
    assert len(batch) == sum(len(episode) for episode in finished[4:])
    kept = make_batch(Rollout(finished), replace(GRPO, filter_rewards=True, compat="rlinf"), MAX_STEPS)
    assert len(kept) == sum(map(len, finished))
    assert int(kept.mask.sum()) == len(batch)
    assert not kept_groups(torch.ones(4), torch.zeros(4), 0.1, 0.9).any()


def test_trajectory_mean_weighs_every_episode_alike() -> None:
    rollout = Rollout(episodes())
    batch = make_batch(rollout, replace(GRPO, loss_agg_func="trajectory-mean"), MAX_STEPS)
    assert batch.weights is not None
    full_chunks = [index for index, episode in enumerate(rollout.trajectories) if episode.steps == MAX_STEPS]
    column = rollout.real.nonzero()[:, 1]
    shares = [float(batch.weights[column == index].sum()) / len(batch) for index in full_chunks]
    assert shares == pytest.approx([1 / 8] * len(full_chunks), rel=1e-5)


def test_rollout_metrics_count_the_steps_of_the_episode() -> None:
    rollout = Rollout(episodes())
    metrics = rollout_metrics(rollout, make_batch(rollout, PPO, MAX_STEPS))
    assert metrics["env/success_once"] == metrics["env/return"] == 6 / 8
    assert metrics["env/episode_len"] == (4 + 12 + 9 + 1 + 12 + 12 + 3 + 7) / 8
    assert metrics["env/steps"] == 8 * metrics["env/episode_len"]
    played_on = Rollout([replace(pad(episode), simulated=MAX_STEPS) for episode in episodes()])
    metrics = rollout_metrics(played_on, make_batch(played_on, replace(PPO, compat="rlinf"), MAX_STEPS))
    assert metrics["env/steps"] == 8 * MAX_STEPS > 8 * metrics["env/episode_len"]
    assert metrics["rollout/advantages_mean"] == pytest.approx(0.0, abs=1e-6)


# --- losses ---


def test_dual_clip_bounds_the_loss_of_a_bad_action() -> None:
    far = torch.full((1, 1, 1, 1), 5.0)
    advantage, mask = torch.tensor([[-2.0]]), torch.ones(1, 1, dtype=torch.bool)
    unbounded, _ = losses.actor_loss(far, 0 * far, advantage, mask, replace(PPO, clip_ratio_c=None))
    bounded, metrics = losses.actor_loss(far, 0 * far, advantage, mask, replace(PPO, clip_ratio_c=3.0))
    assert float(unbounded) == pytest.approx(2 * np.exp(5.0), rel=1e-5)
    assert float(bounded) == pytest.approx(6.0)
    assert float(metrics["actor/dual_clipfrac"]) == 1.0


def test_denoising_steps_have_their_own_ratio_and_are_averaged() -> None:
    generator = torch.Generator().manual_seed(0)
    new, old = (0.1 * torch.randn(4, 3, CHUNK, 7, generator=generator) for _ in range(2))
    advantages, mask = torch.randn(4, 1, generator=generator), torch.tensor([[True], [True], [False], [True]])
    together, metrics = losses.actor_loss(new, old, advantages, mask, PPO)
    single = [losses.actor_loss(new[:, s : s + 1], old[:, s : s + 1], advantages, mask, PPO) for s in range(3)]
    assert float(together) == pytest.approx(np.mean([float(loss) for loss, _ in single]), rel=1e-5)
    for name, value in metrics.items():
        assert float(value) == pytest.approx(np.mean([float(part[name]) for _, part in single]), abs=1e-5), name


def test_one_far_sample_does_not_decide_the_kl_that_is_watched() -> None:
    log_ratio = torch.full((126, 1, 1, 1), 0.1)
    log_ratio[0] = 5.2
    ones = torch.ones(126, 1)
    _, metrics = losses.actor_loss(log_ratio, 0 * log_ratio, ones, ones.bool(), PPO)
    assert watched_kl(PPO) == "actor/approx_kl_k2"
    assert float(metrics["actor/approx_kl_k2"]) == pytest.approx((0.5 * 5.2**2 + 125 * 0.005) / 126, rel=1e-5)
    assert float(metrics["actor/approx_kl_k3"]) > 1.0
    assert watched_kl(replace(PPO, compat="rlinf")) == "actor/approx_kl_k3"


# --- update ---


class Toy(nn.Module):
    """Log-probs of a Gaussian with a learned mean, and a learned value, per sample."""

    def __init__(self, rollout: Rollout) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(CHUNK, 7))
        self.value = nn.Parameter(torch.zeros(1))
        self.actions = torch.from_numpy(rollout.inputs(range(len(rollout))).chains[:, :2, :, :7])

    def evaluate(self, samples: Tensor) -> Evaluation:
        mean = self.mean.expand(len(samples), 2, CHUNK, 7)
        log_probs = -0.5 * (self.actions[samples] - mean) ** 2
        values, entropy = self.value.expand(len(samples)), torch.zeros(len(samples))
        return Evaluation(log_probs, values, entropy, mean, torch.ones_like(mean))


def toy_problem(config: UpdateConfig) -> tuple[Toy, Batch, PolicyOptimizer]:
    rollout = Rollout(episodes())
    toy = Toy(rollout)
    batch = make_batch(rollout, config.algorithm, MAX_STEPS)
    with torch.no_grad():
        batch = replace(batch, log_probs=toy.evaluate(batch.samples).log_probs)
    return toy, batch, PolicyOptimizer({"mean": toy.mean}, {"value": toy.value}, config.optim)


def settings_for(algorithm: AlgorithmConfig = PPO, **optim: float) -> UpdateConfig:
    rates = {"lr": 1e-3, "value_lr": 1e-2} | optim
    return UpdateConfig(algorithm, OptimConfig(**rates), global_batch_size=8, micro_batch_size=3)  # pyright: ignore


def run(config: UpdateConfig, iterations: int = 1) -> tuple[Toy, UpdateReport]:
    toy, batch, optimizer = toy_problem(config)
    reports = []
    for iteration in range(iterations):
        with torch.no_grad():
            batch = replace(batch, log_probs=toy.evaluate(batch.samples).log_probs)
        reports.append(update(toy.evaluate, batch, optimizer, config, iteration))
    return toy, reports[-1]


def test_update_raises_the_likelihood_of_good_actions() -> None:
    config = settings_for(replace(PPO, target_kl=None))
    toy, batch, optimizer = toy_problem(config)
    report = update(toy.evaluate, batch, optimizer, config, iteration=0)
    gain = (toy.evaluate(batch.samples).log_probs - batch.log_probs).sum(dim=(1, 2, 3)).detach()
    assert float((gain * batch.advantages[:, 0]).mean()) > 0
    assert report.metrics["actor/first_ratio_error"] == 0.0
    assert report.metrics["actor/optimizer_steps"] == len(report.steps) == 4 * round(len(batch) / 8)


def test_update_is_deterministic_and_micro_batches_do_not_matter() -> None:
    config = settings_for()
    first, again = (run(config, iterations=2)[0].mean for _ in range(2))
    assert torch.equal(first, again)
    whole = run(replace(config, micro_batch_size=8), iterations=2)[0].mean
    torch.testing.assert_close(first, whole, rtol=0, atol=2e-6)


def test_every_epoch_has_its_own_shuffle_unless_compat() -> None:
    config = settings_for()
    epochs = torch.cat(minibatches(16, config, iteration=1)).reshape(4, 16)
    assert all(torch.equal(epoch.sort().values, torch.arange(16)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4
    compat = replace(config, algorithm=replace(PPO, compat="rlinf"))
    same = [torch.cat(minibatches(16, compat, iteration)).reshape(4, 16) for iteration in (1, 2)]
    assert torch.equal(same[0], same[1])
    assert len({tuple(epoch.tolist()) for epoch in same[0]}) == 1
    with pytest.raises(UserError, match="must divide the 15 samples"):
        minibatches(15, compat, iteration=0)


def test_micro_batches_are_of_one_size_unless_compat() -> None:
    config = UpdateConfig(PPO, global_batch_size=128, micro_batch_size=128)
    assert [len(part) for part in micro_batches(torch.arange(131), config)] == [66, 65]
    assert [len(part) for part in micro_batches(torch.arange(128), config)] == [128]
    compat = replace(config, algorithm=replace(PPO, compat="rlinf"))
    assert [len(part) for part in micro_batches(torch.arange(131), compat)] == [128, 3]


def test_the_kl_stop_ends_the_actors_steps_and_not_the_critics() -> None:
    config = settings_for(replace(PPO, target_kl=0.01), lr=0.3)
    _, report = run(config)
    assert report.stopped_by_kl
    assert len(report.steps) == report.metrics["critic/optimizer_steps"] == 4 * round(len(toy_problem(config)[1]) / 8)
    moved = [not step.critic_only for step in report.steps]
    assert moved == sorted(moved, reverse=True)
    assert 1 <= sum(moved) == report.metrics["actor/optimizer_steps"] < 4
    alone = toy_problem(config)[0]
    optimizer = PolicyOptimizer({"mean": alone.mean}, {}, config.optim)
    actor = replace(config, algorithm=replace(GRPO, target_kl=0.01))
    batch = make_batch(Rollout(episodes()), actor.algorithm, MAX_STEPS)
    with torch.no_grad():
        batch = replace(batch, log_probs=alone.evaluate(batch.samples).log_probs)
    assert len(update(alone.evaluate, batch, optimizer, actor, iteration=0).steps) < 4


def test_the_policys_gradients_do_not_slow_the_critic_unless_compat() -> None:
    toy, _, optimizer = toy_problem(settings_for())
    for jointly, expected in ((False, 0.5), (True, 0.5 / 100.0)):
        toy.mean.grad, toy.value.grad = torch.zeros(CHUNK, 7), torch.tensor([0.5])
        toy.mean.grad[0, 0] = 100.0
        seen: list[float] = []
        hook = optimizer._adamw.register_step_pre_hook(lambda *_, seen=seen: seen.append(float(toy.value.grad)))
        norms = optimizer.step(1e-3, 1e-2, critic_only=False, clip_jointly=jointly)
        hook.remove()
        assert seen == pytest.approx([expected], rel=1e-3)
        assert norms.critic == (None if jointly else 0.5)


def test_a_mismatch_of_log_probs_is_an_error() -> None:
    config = settings_for()
    toy, batch, optimizer = toy_problem(config)
    wrong = replace(batch, log_probs=batch.log_probs + 0.01)
    with pytest.raises(UserError, match="does not recompute what the rollout sampled"):
        update(toy.evaluate, wrong, optimizer, config, iteration=0)


def test_non_finite_steps_are_skipped_and_reported() -> None:
    config = settings_for()
    toy, batch, optimizer = toy_problem(config)

    def poisoned(samples: Tensor) -> Evaluation:
        result = toy.evaluate(samples)
        assert result.values is not None
        return replace(result, values=result.values * torch.inf)

    report = update(poisoned, batch, optimizer, config, iteration=0)
    assert report.metrics["actor/skipped_steps"] == len(report.steps)
    assert optimizer.steps == 0
    assert torch.equal(toy.mean, torch.zeros_like(toy.mean))


def test_what_an_update_has_no_samples_of_is_not_reported() -> None:
    config = settings_for()
    toy, batch, optimizer = toy_problem(config)
    report = update(toy.evaluate, batch.rows(torch.arange(0)), optimizer, config, iteration=0)
    assert report.metrics["actor/optimizer_steps"] == 0.0
    assert all(math.isfinite(value) for value in report.metrics.values())
    assert not {"actor/first_ratio_error", "actor/grad_norm", "actor/lr"} & report.metrics.keys()


def test_critic_warm_up_leaves_the_actor_alone() -> None:
    toy, report = run(settings_for(critic_warmup_iterations=1))
    assert torch.equal(toy.mean, torch.zeros_like(toy.mean))
    assert float(toy.value.detach()) != 0.0
    assert {step.actor_lr for step in report.steps} == {0.0}
    toy, report = run(settings_for(critic_warmup_steps=2))
    assert [step.actor_lr == 0.0 for step in report.steps][:3] == [True, True, False]
    assert not torch.equal(toy.mean, torch.zeros_like(toy.mean))


def test_optimizer_state_continues_to_the_same_bytes() -> None:
    config = settings_for(adam_warmup_steps=20)
    toy, batch, optimizer = toy_problem(config)
    update(toy.evaluate, batch, optimizer, config, iteration=0)
    saved = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    moved = toy_problem(config)[2]
    moved.load_state_dict(saved)
    moved.move("meta")
    moments = {name: tensor for name, tensor in moved.state_dict().items() if "exp_avg" in name}
    assert moments
    assert all(tensor.is_meta for tensor in moments.values())
    weights = {name: tensor.clone() for name, tensor in toy.state_dict().items()}
    batch = replace(batch, log_probs=toy.evaluate(batch.samples).log_probs.detach())
    update(toy.evaluate, batch, optimizer, config, iteration=1)

    resumed, _, fresh = toy_problem(config)
    resumed.load_state_dict(weights)
    fresh.load_state_dict(saved)
    update(resumed.evaluate, batch, fresh, config, iteration=1)
    assert torch.equal(resumed.mean, toy.mean)
    assert torch.equal(resumed.value, toy.value)


@pytest.mark.parametrize("kind", ["gaussian", "low_var_kl", "mse"])
def test_kl_term_pulls_back_to_the_reference(kind: Literal["gaussian", "low_var_kl", "mse"]) -> None:
    algorithm = replace(PPO, kl_beta=100.0, kl_penalty=kind, target_kl=None)
    pulled = settings_for(algorithm)
    toy, batch, optimizer = toy_problem(pulled)
    with torch.no_grad():
        start = toy.evaluate(batch.samples)
    assert start.mean is not None
    assert start.std is not None
    batch = replace(batch, reference=Reference(start.log_probs, start.mean.clone(), start.std))
    report = update(toy.evaluate, batch, optimizer, pulled, iteration=0)
    free, _ = run(settings_for(replace(algorithm, kl_beta=0.0)))
    assert float(toy.mean.detach().norm()) < float(free.mean.detach().norm())
    assert report.metrics["actor/ref_kl"] >= 0.0


def test_gaussian_kl_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, ref_mean = torch.randn(2, 50, generator=generator)
    std, ref_std = 0.1 + torch.rand(2, 50, generator=generator)
    expected = torch.distributions.kl_divergence(Normal(mean, std), Normal(ref_mean, ref_std))
    torch.testing.assert_close(losses.gaussian_kl(mean, std, ref_mean, ref_std), expected)
    assert not losses.gaussian_kl(mean, 0 * std, ref_mean, 0 * ref_std).any()  # an ODE step is not random


def test_entropy_bonus_counts_events() -> None:
    totals = {}
    for kind in ("token_level", "action_level", "chunk_level"):
        config = settings_for(replace(PPO, entropy_bonus=1.0, entropy_type=kind, update_epoch=1, value_clip=None))
        toy, batch, optimizer = toy_problem(config)

        def certain(samples: Tensor, toy: Toy = toy) -> Evaluation:
            return replace(toy.evaluate(samples), entropy=torch.ones(len(samples)))

        report = update(certain, batch, optimizer, config, iteration=0)
        metrics = report.metrics
        totals[kind] = metrics["actor/policy_loss"] + metrics["actor/value_loss"] - metrics["actor/loss"]
        assert metrics["actor/entropy"] == pytest.approx(1.0)
    assert totals == pytest.approx({"token_level": 1, "action_level": 7, "chunk_level": 7 * CHUNK}, rel=1e-4)


def test_schedules() -> None:
    cosine = OptimConfig(lr_scheduler="cosine", total_training_steps=100, lr_warmup_steps=10, min_lr_rate=0.1)
    assert [learning_rate_factor(cosine, step) for step in (0, 4, 9, 10, 55)] == pytest.approx([0.1, 0.5, 1, 1, 0.55])
    assert learning_rate_factor(cosine, 150) == pytest.approx(0.1)
    assert learning_rate_factor(cosine, 0, compat=True) == 0.0
    assert learning_rate_factor(cosine, 150, compat=True) > 0.2
    linear = replace(cosine, lr_scheduler="linear")
    assert learning_rate_factor(linear, 55) == pytest.approx(0.55)
    warm = OptimConfig(adam_warmup_steps=4)
    assert [adam_warmup_factor(warm, step) for step in (0, 1, 3, 9)] == [0.25, 0.5, 1.0, 1.0]


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(UserError, match="adv_type=grpo needs actor"):
        AlgorithmConfig(adv_type="grpo")
    with pytest.raises(UserError, match="at least 2"):
        AlgorithmConfig(adv_type="grpo", loss_type="actor", group_size=1)
    for name, value in {"value_clip": -0.2, "target_kl": 0.0, "clip_log_ratio_min": 0.1, "entropy_bonus": -1.0}.items():
        with pytest.raises(UserError, match=f"algorithm.{name}={value}: must"):
            replace(PPO, **{name: value})
    with pytest.raises(UserError, match="pull nowhere"):
        replace(PPO, kl_penalty="kl", kl_beta=0.1)
    assert replace(PPO, kl_penalty="kl").kl_beta == 0.0  # as RLinf's params have it
    with pytest.raises(UserError, match="micro_batch_size"):
        UpdateConfig(global_batch_size=4, micro_batch_size=8)
