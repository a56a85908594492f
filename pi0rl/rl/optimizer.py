"""AdamW over an actor and a critic group, with the counters that resuming needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pi0rl.rl.config import OptimConfig


@dataclass(frozen=True)
class GradientNorms:
    """L2 norms before clipping, None where nothing was clipped; of all gradients together, it is the actor's."""

    actor: float | None
    critic: float | None

    @property
    def finite(self) -> bool:
        return all(math.isfinite(norm) for norm in (self.actor, self.critic) if norm is not None)


class PolicyOptimizer:
    """One AdamW with separate learning rates for the actor's and the critic's parameters.

    Parameters may be spread over several processes: then they have a type of their own, and ``whole`` makes a plain
    tensor of what is computed from them.

    Attributes:
        steps: optimiser steps taken, the critic-only ones included.
        actor_steps: those of them that moved the actor.
        updates: RL iterations that made these weights; the iteration's number counts on after a rollback, this not.
    """

    def __init__(
        self,
        actor: Mapping[str, nn.Parameter],
        critic: Mapping[str, nn.Parameter],
        config: OptimConfig,
        whole: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        self.config, self._whole = config, whole
        self.actor = dict(actor)
        self.critic = dict(critic)
        self.steps = 0
        self.actor_steps = 0
        self.updates = 0
        # AdamW steps a group at once, which it cannot where types are mixed
        groups = [{"params": group, "critic": False} for group in _by_type(self.actor.values())]
        groups += [{"params": group, "critic": True} for group in _by_type(self.critic.values())]
        self._adamw = torch.optim.AdamW(
            groups,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
        )

    def zero_grad(self) -> None:
        self._adamw.zero_grad(set_to_none=True)

    def step(self, actor_lr: float, value_lr: float, critic_only: bool, clip_jointly: bool = False) -> GradientNorms:
        """Clip the gradients to an L2 norm of ``clip_grad`` and step, unless a norm is not finite.

        Args:
            critic_only: leave the actor as it is: no gradient, no momentum, no weight decay.
            clip_jointly: one norm for actor and critic, as in RLinf. Where each has its own, the scale of the policy's
                gradients does not decide how fast the critic learns.

        Returns:
            The norms before clipping; the step was taken if they are finite.
        """
        if critic_only:
            for parameter in self.actor.values():
                parameter.grad = None
        actor, critic = list(self.actor.values()), list(self.critic.values())
        if clip_jointly:
            norms = GradientNorms(self._clip([*actor, *critic]), None)
        else:
            norms = GradientNorms(None if critic_only else self._clip(actor), self._clip(critic) if critic else None)
        if norms.finite:
            for group in self._adamw.param_groups:
                group["lr"] = value_lr if group["critic"] else actor_lr
            self._adamw.step()
            self.steps += 1
            self.actor_steps += not critic_only
        self.zero_grad()
        return norms

    def _clip(self, parameters: Sequence[nn.Parameter]) -> float:
        """The joint norm of the parameters' gradients before it is clipped."""
        groups = _by_type(parameters)
        if len(groups) == 1:
            return float(torch.nn.utils.clip_grad_norm_(groups[0], self.config.clip_grad))
        gradients = [[parameter.grad for parameter in group if parameter.grad is not None] for group in groups]
        norms = [self._whole(torch.nn.utils.get_total_norm(group)) for group in gradients if group]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        factor = float((self.config.clip_grad / (norm + 1e-6)).clamp(max=1.0))
        for gradient in (gradient for group in gradients for gradient in group):
            gradient.mul_(factor)
        return float(norm)

    def forget(self) -> None:
        """Drop Adam's moments (RLinf rebuilds its optimiser after the critic warm-up)."""
        self._adamw.state.clear()

    def reset(self) -> None:
        """As at the start of a run."""
        self.forget()
        self.steps = self.actor_steps = self.updates = 0

    def move(self, device: str) -> None:
        """Keep Adam's moments on ``device``; steps need them where the parameters are."""
        for state in self._adamw.state.values():
            for key, value in state.items():
                if key != "step":
                    state[key] = value.to(device)

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors: three counters, and ``<parameter>/<exp_avg, exp_avg_sq or step>``."""
        state = {name: torch.tensor(getattr(self, name)) for name in ("steps", "actor_steps", "updates")}
        for name, parameter in (self.actor | self.critic).items():
            for key, value in self._adamw.state.get(parameter, {}).items():
                state[f"{name}/{key}"] = value.detach().clone()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from :meth:`state_dict`; a name that is not a parameter of this optimiser raises KeyError."""
        parameters = self.actor | self.critic
        self.forget()
        for full_name, value in state.items():
            name, _, key = full_name.rpartition("/")
            if name:
                parameter = parameters[name]
                device = "cpu" if key == "step" else parameter.device
                self._adamw.state[parameter][key] = value.detach().clone().to(device)
        self.steps = int(state["steps"])
        self.actor_steps = int(state["actor_steps"])
        self.updates = int(state["updates"])


def _by_type(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """``parameters`` in groups of one type each, in their order."""
    groups: dict[type, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(type(parameter), []).append(parameter)
    return list(groups.values())
