"""The actor component: a Ray actor that owns the trained weights and the optimiser."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pi0rl.cluster.sharding import Shards, part_of, whole
from pi0rl.cluster.team import ProcessTeam
from pi0rl.policy.average import MovingAverage
from pi0rl.policy.checkpoints import load_policy, save_policy
from pi0rl.policy.lora import LoraConfig, with_lora
from pi0rl.policy.model import Prefix, concatenate
from pi0rl.policy.policy import Policy
from pi0rl.policy.sampling import SamplerConfig, evaluate_chains
from pi0rl.policy.weights import write_safetensors
from pi0rl.rl.advantages import Reference, make_batch
from pi0rl.rl.config import UpdateConfig, effective
from pi0rl.rl.metrics import rollout_metrics
from pi0rl.rl.optimizer import PolicyOptimizer
from pi0rl.rl.trajectories import Rollout, Trajectory, elapsed_time
from pi0rl.rl.update import Evaluate, Evaluation, update

# In a checkpoint beside policy/: the optimiser; what was trained, where policy/ has adapters merged or is an average;
# that average in float32.
OPTIMIZER, TRAINED, AVERAGE = "optimizer.safetensors", "trained.safetensors", "average.safetensors"
# A frozen prefix is computed once per update and kept for all its epochs, as long as it fits in this much memory.
PREFIX_CACHE_BYTES = 2 * 2**30


class ActorWorker:
    """Trains the policy on finished episodes."""

    def __init__(
        self,
        start: Path,
        sampler: SamplerConfig,
        lora: LoraConfig | None,
        config: UpdateConfig,
        train_expert_only: bool,
        gradient_checkpointing: bool,
        num_threads: int,
        device: str,
        compiled: bool = False,
        sharded: bool = False,
        offload: bool = False,
        ema_decay: float | None = None,
    ) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        torch.use_deterministic_algorithms(True)
        self._num_threads = num_threads
        self._team: ProcessTeam | None = None
        self._start, self._sampler, self._config, self._device = start, sampler, config, device
        self._lora, self._train_expert_only = lora, train_expert_only
        self._gradient_checkpointing, self._compiled, self._sharded = gradient_checkpointing, compiled, sharded
        self._shards: Shards | None = None
        self._moments_rest = "cpu" if offload else device
        self._ema_decay = ema_decay
        self._average: MovingAverage | None = None
        self._shown = ExitStack()

    def start(self) -> None:
        """Load the policy. Not done when the actor is created: Ray would hide why it failed."""
        self._policy = with_lora(load_policy(self._start), self._lora).to(self._device)
        self._policy.model.set_gradient_checkpointing(self._gradient_checkpointing)
        if self._compiled:
            self._policy.model.compile_layers()
        self._take_hold()
        self._average_from(self._whole_trained())

    def _take_hold(self) -> None:
        """Of the weights as they are kept from now on."""
        self._trainable = self._policy.trainable_parameters(self._train_expert_only)
        critic = {name: p for name, p in self._trainable.items() if name.startswith("value_head.")}
        actor = {name: p for name, p in self._trainable.items() if name not in critic}
        self._optimizer = PolicyOptimizer(actor, critic, self._config.optim, whole)
        keeps = effective(self._config.algorithm).kl_beta > 0.0
        self._reference = {name: p.detach().clone() for name, p in actor.items()} if keeps else {}

    def _whole_trained(self) -> dict[str, nn.Parameter]:
        """The trained weights where they are not spread."""
        return self._policy.trainable_parameters(self._train_expert_only)

    def _average_from(self, weights: Mapping[str, Tensor]) -> None:
        """Where an average is kept it is now that of ``weights`` alone. It is needed once in an iteration, so that main
        memory will do for it."""
        if self._ema_decay is not None:
            self._average = MovingAverage([weights[name] for name in self._trainable], self._ema_decay, "cpu")

    def join(self, address: str, rank: int, size: int) -> None:
        """Make every update together with ``size - 1`` other actors that join at ``address``."""
        self._team = ProcessTeam(address, rank, size, in_step=self._sharded)
        if self._sharded:
            self._shards = Shards(self._policy, size)
            with self._spread():
                self._take_hold()

    def _spread(self) -> AbstractContextManager[None]:
        """Where the weights are spread over the actors, they are so in the block."""
        return nullcontext() if self._shards is None else self._shards.spread()

    @contextmanager
    def _moments_here(self) -> Iterator[None]:
        """Where AdamW's moments rest in main memory, they are on the device in the block."""
        self._optimizer.move(self._device)
        yield
        self._optimizer.move(self._moments_rest)

    @property
    def policy(self) -> Policy:
        """What is trained; a rollout worker in this process acts with it."""
        return self._policy

    def resume(self, directory: Path | None) -> None:
        """Go on from what ``save`` wrote there; without a folder, from the start of the run.

        A saved policy has adapters merged, and is the average where one is kept: then what was trained has a file of
        its own.
        """
        if directory is None:
            earlier = with_lora(load_policy(self._start), self._lora).named_weights()
        elif self._policy_is_what_was_trained:
            earlier = load_policy(directory / "policy").named_weights()
        else:
            earlier = load_file(directory / TRAINED)
        with torch.no_grad(), self._spread():
            for name, parameter in self._trainable.items():
                parameter.copy_(part_of(earlier[name], parameter))
        if directory is None:
            self._optimizer.reset()
            self._average_from(earlier)
        else:
            state = load_file(directory / OPTIMIZER)
            for full_name, value in state.items():
                name, _, key = full_name.rpartition("/")
                if name in self._trainable and key != "step":
                    state[full_name] = part_of(value, self._trainable[name])
            self._optimizer.load_state_dict(state)
            self._optimizer.move(self._moments_rest)
            if self._average is not None:
                self._average_from(load_file(directory / AVERAGE))

    @property
    def _policy_is_what_was_trained(self) -> bool:
        return self._lora is None and self._average is None

    def show_average(self) -> None:
        """The policy's weights are their average, where one is kept, until ``put_back``."""
        if self._average is not None:
            self._shown.enter_context(self._average.in_place_of(list(self._whole_trained().values())))

    def put_back(self) -> None:
        """The policy's weights are again those that are trained."""
        self._shown.close()

    def save(self, directory: Path) -> None:
        """Write policy and optimiser into the existing folder ``directory``, which the first of several actors does."""
        first = self._team is None or self._team.rank == 0
        if not first and self._shards is None:
            return
        moments = {}
        with self._moments_here():
            for name, value in self._optimizer.state_dict().items():
                together = whole(value)  # of what is spread, all take part
                if first:
                    moments[name] = together.cpu()
        if not first:
            return
        self.show_average()
        save_policy(self._policy, directory / "policy")
        self.put_back()
        if not self._policy_is_what_was_trained:
            write_safetensors(directory / TRAINED, self.weights())
        if self._average is not None:
            write_safetensors(directory / AVERAGE, dict(zip(self._whole_trained(), self._average.values, strict=True)))
        write_safetensors(directory / OPTIMIZER, moments)

    def weights(self) -> dict[str, Tensor]:
        """The trained weights only, on the CPU; between ``show_average`` and ``put_back`` their average."""
        return {name: parameter.detach().cpu() for name, parameter in self._whole_trained().items()}

    def update(
        self, iteration: int, max_episode_steps: int, *parts: list[Trajectory], lr_factor: float = 1.0
    ) -> dict[str, float]:
        """Advantages and all epochs of one iteration; returns its metrics.

        Args:
            parts: the trajectories of every rollout worker.
            lr_factor: on all learning rates, below 1 after a rollback.
        """
        torch.set_num_threads(self._num_threads)
        rollout = Rollout(trajectory for part in parts for trajectory in part)
        batch = make_batch(rollout, self._config.algorithm, max_episode_steps)
        self._policy.train()
        with self._spread(), self._moments_here():
            evaluate = self._evaluator(rollout, iteration, max_episode_steps)
            if self._reference and len(batch):
                batch = replace(batch, reference=self._make_of_it_at_the_start(evaluate, batch.samples))
            report = update(evaluate, batch, self._optimizer, self._config, iteration, lr_factor, self._team)
        if self._average is not None:
            self._average.follow(list(self._whole_trained().values()))
        return rollout_metrics(rollout, batch) | report.metrics

    def _make_of_it_at_the_start(self, evaluate: Evaluate, samples: Tensor) -> Reference:
        """What the policy that the run began with makes of ``samples``, for the KL term to it.

        The trained weights change places with those of the start meanwhile: one more copy of them is all it takes.
        """
        self._change_places()
        with torch.no_grad():
            parts = [evaluate(some) for some in samples.split(self._config.micro_batch_size)]
        self._change_places()
        means, stds = ([part.mean for part in parts], [part.std for part in parts])
        return Reference(
            log_probs=torch.cat([part.log_probs for part in parts]),
            mean=torch.cat([mean for mean in means if mean is not None]),
            std=torch.cat([std for std in stds if std is not None]),
        )

    @torch.no_grad()
    def _change_places(self) -> None:
        for name, elsewhere in self._reference.items():
            parameter = self._trainable[name]
            here = parameter.detach().clone()
            parameter.copy_(elsewhere)  # in place: weights that are spread have no other way
            elsewhere.copy_(here)

    def _evaluator(self, rollout: Rollout, iteration: int, max_episode_steps: int) -> Evaluate:
        prefix_of, sampler = self._prefixes(rollout), self._sampler.at(iteration)

        def evaluate(samples: Tensor) -> Evaluation:
            inputs = rollout.inputs(samples.tolist())
            chains = torch.from_numpy(inputs.chains).to(self._device)
            inds = torch.from_numpy(inputs.denoise_inds).to(self._device)
            elapsed = torch.from_numpy(elapsed_time(inputs.chunks, max_episode_steps, sampler.action_chunk))
            prefix = prefix_of(samples)
            result = evaluate_chains(self._policy, prefix, chains, inds, sampler, elapsed.to(self._device))
            return Evaluation(
                log_probs=result.log_probs.cpu(),
                values=result.values.cpu(),
                entropy=result.entropy.cpu() if sampler.method == "flow_noise" else None,
                mean=result.mean.cpu(),
                std=result.std.cpu(),
            )

        return evaluate

    def _prefixes(self, rollout: Rollout) -> Callable[[Tensor], Prefix]:
        """Samples -> prefix: looked up if it is frozen and fits in memory, else computed, with gradient if trained."""
        size = self._config.micro_batch_size

        def compute(samples: Tensor) -> Prefix:
            observation = rollout.inputs(samples.tolist()).observation
            return self._policy.prefix(self._policy.processing.inputs(observation).to(self._device))

        if self._policy.trains_prefix(self._train_expert_only):
            return compute
        with torch.no_grad():
            parts = [compute(torch.arange(min(size, len(rollout))))]
            if _bytes(parts[0]) / len(parts[0]) * len(rollout) > PREFIX_CACHE_BYTES:
                return torch.no_grad()(compute)
            parts += [compute(samples) for samples in torch.arange(len(rollout)).split(size)[1:]]
        everything = concatenate(parts)
        return lambda samples: everything.rows(samples.to(self._device))


def _bytes(prefix: Prefix) -> int:
    return sum(tensor.nbytes for pair in prefix.cache for tensor in pair)
