"""The rollout and the actor component on made-up looks, without simulators and without Ray."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from tiny_policies import PREFIX_CRITIC, make_policy, observe

from pi0rl.cluster.actor_worker import ActorWorker
from pi0rl.cluster.rollout_worker import NoiseKey, RolloutWorker
from pi0rl.cluster.setup import loop_config, lora_config, sampler_config
from pi0rl.errors import UserError
from pi0rl.libero.plan import Episode
from pi0rl.libero.slots import Look, Played
from pi0rl.params import Params, load_params
from pi0rl.policy.checkpoints import load_policy, save_policy
from pi0rl.policy.weights import policy_tensors
from pi0rl.rl.trajectories import Rollout, Trajectory

QUICKSTART = Path(__file__).parents[1] / "params" / "quickstart.yaml"
EPISODES, CHUNKS, CHUNK = 4, 3, 8
PLAN = tuple(Episode(index, "libero_object", index, "official", 0, 0) for index in range(EPISODES))
SMALL = ("actor.global_batch_size=12", "actor.micro_batch_size=6", "algorithm.update_epoch=1")
ANNEALED = ("openpi.noise_anneal=true", "openpi.noise_params=[0.7, 0.1, 4]")


@pytest.fixture(autouse=True)
def _process() -> Iterator[None]:
    """Workers change their process: put back what they changed."""
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    signal.signal(signal.SIGINT, handler)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("workers") / "policy"
    save_policy(make_policy(PREFIX_CRITIC), directory)
    return directory


def quickstart(*overrides: str) -> Params:
    return load_params(QUICKSTART, (*SMALL, *overrides))


def start_rollout(params: Params, checkpoint: Path) -> RolloutWorker:
    limit = CHUNKS * CHUNK
    worker = RolloutWorker(checkpoint, sampler_config(params), lora_config(params), 1, "cpu", max_episode_steps=limit)
    worker.start()
    return worker


def start_actor(params: Params, checkpoint: Path) -> ActorWorker:
    config = loop_config(params)
    settings = sampler_config(params), lora_config(params), config.update, config.train_expert_only
    worker = ActorWorker(checkpoint, *settings, False, 1, "cpu", ema_decay=config.ema_decay)
    worker.start()
    return worker


def played(params: Params, rollout: RolloutWorker, iteration: int, luck: float = 0.1) -> list[Trajectory]:
    """The trajectories of episodes that see noise for pictures and succeed by luck."""
    rng = np.random.default_rng(iteration)
    rollout.begin(NoiseKey(0, 0, iteration), "train")
    index, before = np.arange(EPISODES), None
    for chunk in range(CHUNKS + 1):
        over = chunk == CHUNKS
        episode = np.full(EPISODES, -1) if over else index
        rollout.act(Look(observe(EPISODES, chunk), episode, np.full(EPISODES, chunk), before))
        success = rng.random((EPISODES, CHUNK)) < (luck if chunk == CHUNKS - 1 else 0.0)
        before = Played(index, success, np.full(EPISODES, CHUNK), np.full(EPISODES, chunk == CHUNKS - 1))
    return rollout.trajectories(PLAN, params.algorithm, CHUNKS * CHUNK)


@pytest.mark.parametrize("iteration", [0, 3, 9])
def test_rollout_and_update_anneal_the_noise_together(checkpoint: Path, iteration: int) -> None:
    params = quickstart(*ANNEALED)
    trajectories = played(params, start_rollout(params, checkpoint), iteration)
    metrics = start_actor(params, checkpoint).update(iteration, CHUNKS * CHUNK, trajectories)
    assert metrics["actor/first_ratio_error"] < 1e-3


def test_another_noise_level_would_be_noticed(checkpoint: Path) -> None:
    params = quickstart(*ANNEALED)
    trajectories = played(params, start_rollout(params, checkpoint), iteration=0)
    with pytest.raises(UserError, match="ratio"):
        start_actor(params, checkpoint).update(4, CHUNKS * CHUNK, trajectories)


def test_the_noise_level_is_annealed_by_rl_steps() -> None:
    sampler = sampler_config(quickstart(*ANNEALED))
    assert [sampler.at(step).noise_level for step in (0, 2, 4, 9)] == pytest.approx([0.7, 0.4, 0.1, 0.1])
    constant = sampler_config(quickstart("openpi.noise_params=[0.7, 0.1, 4]"))
    assert constant.at(9).noise_level == 0.6


@pytest.mark.parametrize("source", ["prefix", "expert"])
def test_rollout_and_update_show_the_critic_the_same_time(source: Literal["prefix", "expert"], tmp_path: Path) -> None:
    critic = replace(PREFIX_CRITIC, append_time=True)
    if source == "expert":
        critic = replace(critic, source=source, append_state=False, matches_rollout=True)
    save_policy(make_policy(critic), tmp_path / "policy")
    params = quickstart("openpi.value_sees_time=true")
    trajectories = played(params, start_rollout(params, tmp_path / "policy"), iteration=0)
    assert all(len(set(trajectory.values)) == len(trajectory) for trajectory in trajectories)
    actor = start_actor(params, tmp_path / "policy")
    rollout = Rollout(trajectories)
    evaluate = actor._evaluator(rollout, 0, CHUNKS * CHUNK)
    recorded = rollout.values[:-1][rollout.real][:, 0]
    with torch.no_grad():
        values = evaluate(torch.arange(len(rollout))).values
        assert values is not None
        torch.testing.assert_close(values, recorded, atol=1e-6, rtol=1e-6)
    late = actor._evaluator(rollout, 0, 2 * CHUNKS * CHUNK)
    with torch.no_grad():
        assert not torch.allclose(late(torch.arange(len(rollout))).values, recorded)
    actor.save(tmp_path)
    config = tmp_path / "policy" / "config.json"
    config.write_text(config.read_text().replace('"append_time": true', '"append_time": false'))
    with pytest.raises(UserError, match=r"value_head\.mlp\.0\.weight has shape"):
        load_policy(tmp_path / "policy")


FAST = ("actor.optim.lr=0.001", "actor.optim.critic_warmup_iterations=0", "algorithm.target_kl=null")
LORA = ("actor.model.is_lora=true", "actor.model.lora_rank=4", *FAST)
AVERAGE = ("actor.ema_decay=0.75", *FAST)


@pytest.mark.parametrize("overrides", [LORA, (*AVERAGE, *LORA)], ids=["adapters", "their average"])
def test_a_run_with_adapters_hands_over_and_resumes(
    overrides: tuple[str, ...], checkpoint: Path, tmp_path: Path
) -> None:
    """The rollout side takes over adapters by name, and a resumed run ends in the same bytes."""
    params = quickstart(*overrides)
    rollout, actor = start_rollout(params, checkpoint), start_actor(params, checkpoint)

    def iterate(number: int, rollout, actor) -> dict[str, float]:
        metrics = actor.update(number, CHUNKS * CHUNK, played(params, rollout, number))
        rollout.load(actor.weights())
        return metrics

    assert iterate(0, rollout, actor)["actor/optimizer_steps"] > 0
    folders = [tmp_path / name for name in ("first", "straight", "resumed")]
    for folder in folders:
        folder.mkdir()
    actor.save(folders[0])
    assert iterate(1, rollout, actor)["actor/first_ratio_error"] < 1e-3
    actor.save(folders[1])

    rollout, actor = start_rollout(params, checkpoint), start_actor(params, checkpoint)
    actor.resume(folders[0])
    rollout.load(actor.weights())
    iterate(1, rollout, actor)
    actor.save(folders[2])
    files = sorted(str(path.relative_to(folders[1])) for path in folders[1].rglob("*.safetensors"))
    assert len(files) == (4 if "actor.ema_decay=0.75" in overrides else 3)
    for file in files:
        assert (folders[2] / file).read_bytes() == (folders[1] / file).read_bytes(), file
    text = "paligemma_with_expert.paligemma.model.language_model.layers.0.mlp.gate_proj.weight"
    places = (checkpoint, folders[0] / "policy", folders[1] / "policy")
    start, first, second = (policy_tensors(load_policy(place))[text] for place in places)
    assert not torch.equal(start, first)
    assert not torch.equal(first, second)


def test_the_average_is_shown_and_saved_while_the_weights_are_trained(checkpoint: Path, tmp_path: Path) -> None:
    params = quickstart(*AVERAGE)
    rollout, actor = start_rollout(params, checkpoint), start_actor(params, checkpoint)

    def trained() -> dict[str, torch.Tensor]:
        return {name: weight.clone() for name, weight in actor.weights().items()}

    seen = [trained()]
    for iteration in range(2):
        metrics = actor.update(iteration, CHUNKS * CHUNK, played(params, rollout, iteration))
        assert metrics["actor/first_ratio_error"] < 1e-3
        seen.append(trained())
        rollout.load(actor.weights())
    actor.show_average()
    shown = trained()
    actor.put_back()
    actor.save(tmp_path)
    saved = policy_tensors(load_policy(tmp_path / "policy"))
    for name, weight in actor.weights().items():
        start, first, second = (weights[name] for weights in seen)
        assert torch.equal(weight, second)
        expected = 0.75**2 * start + 0.75 * 0.25 * first + 0.25 * second
        torch.testing.assert_close(shown[name], expected, atol=1e-6, rtol=1e-5)
        assert torch.equal(saved[name], shown[name])
    actor.resume(None)
    actor.show_average()
    assert all(torch.equal(weight, seen[0][name]) for name, weight in trained().items())


def test_where_every_group_is_filtered_nothing_is_learned_and_nothing_is_nan(tmp_path: Path) -> None:
    save_policy(make_policy(), tmp_path / "policy")
    grpo = ("openpi.add_value_head=false", "algorithm.adv_type=grpo", "algorithm.group_size=4")
    params = quickstart(*grpo, "algorithm.filter_rewards=true", "algorithm.kl_beta=0.1")
    rollout, actor = (start(params, tmp_path / "policy") for start in (start_rollout, start_actor))
    before = {name: weight.clone() for name, weight in actor.weights().items()}
    metrics = actor.update(0, CHUNKS * CHUNK, played(params, rollout, 0, luck=0.0))
    assert metrics["rollout/samples"] == metrics["actor/optimizer_steps"] == 0.0
    assert np.isfinite(list(metrics.values())).all()
    assert all(torch.equal(weight, before[name]) for name, weight in actor.weights().items())


def test_the_kl_term_is_to_the_policy_that_training_began_with(checkpoint: Path) -> None:
    params = quickstart(
        "algorithm.kl_beta=0.1",
        "algorithm.target_kl=null",
        "actor.optim.lr=1.0e-4",
        "actor.optim.adam_warmup_steps=0",
        "actor.optim.critic_warmup_iterations=0",
    )
    rollout, actor = start_rollout(params, checkpoint), start_actor(params, checkpoint)
    distances = []
    for iteration in range(3):
        metrics = actor.update(iteration, CHUNKS * CHUNK, played(params, rollout, iteration))
        assert metrics["actor/first_ratio_error"] < 1e-3  # the weights are back in their places
        distances.append(metrics["actor/ref_kl"])
        rollout.load(actor.weights())
    assert distances[0] == pytest.approx(0.0, abs=1e-9)  # a single optimiser step: measured before it
    assert min(distances[1:]) > 1e-3
    actor.resume(None)
    rollout.load(actor.weights())
    again = actor.update(3, CHUNKS * CHUNK, played(params, rollout, 3))
    assert again["actor/ref_kl"] == pytest.approx(0.0, abs=1e-9)
