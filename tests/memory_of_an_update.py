"""Run as a program: bytes that one forward and backward pass of the tiny policy really adds to this process."""

from __future__ import annotations

import sys

import psutil
import torch
from tiny_policies import SDE, make_policy, noise_for, observe

from pi0rl.policy.critic import CriticConfig
from pi0rl.policy.sampling import evaluate_chains


def peak_bytes() -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    batch, checkpointing = int(sys.argv[1]), sys.argv[2] == "checkpointing"
    torch.set_num_threads(1)
    policy = make_policy(CriticConfig("expert", (128, 64)))
    policy.trainable_parameters(train_expert_only=True)
    policy.model.set_gradient_checkpointing(checkpointing)

    def update(rows: int) -> None:
        inputs = policy.processing.inputs(observe(4)).rows(torch.arange(rows) % 4)
        chains = torch.cat((noise_for(range(4)).initial[:, None], noise_for(range(4)).steps), dim=1)[
            torch.arange(rows) % 4
        ]
        with torch.no_grad():
            prefix = policy.full_prefix(inputs)
        result = evaluate_chains(policy, prefix, chains, torch.arange(4).expand(rows, 4), SDE)
        (result.log_probs.mean() + result.values.mean() + result.entropy.mean()).backward()

    update(4)
    before = psutil.Process().memory_info().rss
    update(batch)
    print(peak_bytes() - before)


if __name__ == "__main__":
    main()
