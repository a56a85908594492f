"""The benchmark beside LeRobot, with a stand-in for LeRobot's package: what is exchanged, and what is said."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from tiny_policies import K, make_policy, noise_for, observe

from benchmarks import against_lerobot
from pi0rl.errors import UserError
from pi0rl.policy.sampling import SamplerConfig, sample

# The one class and method of LeRobot that is used: pi0rl's network behind its signature.
STAND_IN = """
import os
import torch
from pi0rl.policy.checkpoints import load_policy
from pi0rl.policy.model import ModelInputs
from pi0rl.policy.sampling import SamplerConfig, SamplingNoise, sample
from pi0rl.policy.weights import policy_tensors

class PI0Policy:
    @classmethod
    def from_pretrained(cls, folder):
        self = cls()
        self.model = self
        self.policy = load_policy(folder)
        if "LOSE_A_WEIGHT" in os.environ:
            self.policy.model.action_in_proj.bias.data += 1
        return self

    def eval(self):
        return self

    def state_dict(self):
        return {f"model.{name}": weight for name, weight in policy_tensors(self.policy).items()}

    def sample_actions(self, images, masks, tokens, token_mask, state, noise=None, num_steps=None):
        assert isinstance(images, list) and isinstance(masks, list)
        inputs = ModelInputs(torch.stack(images, 1), torch.stack(masks, 1), tokens, token_mask, state)
        still = torch.zeros(len(state), num_steps, *noise.shape[1:])
        config = SamplerConfig("flow_ode", num_steps=num_steps)
        return sample(self.policy, inputs, SamplingNoise(noise, still, torch.zeros(len(state))), config, "eval").actions
"""


def test_lerobot_gets_the_same_weights_and_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, noise = make_policy(), noise_for(range(3))
    inputs = policy.processing.inputs(observe(3))
    actions = sample(policy, inputs, noise, SamplerConfig("flow_ode", num_steps=K), "eval").actions
    against_lerobot.write(policy, inputs, noise, K, actions, tmp_path)
    package = tmp_path / "site/lerobot/policies/pi0"
    package.mkdir(parents=True)
    (package / "modeling_pi0.py").write_text(STAND_IN)
    (tmp_path / "site/lerobot-9.dist-info").mkdir()
    (tmp_path / "site/lerobot-9.dist-info/METADATA").write_text("Name: lerobot\nVersion: 9.8\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), str(Path(__file__).parents[1])]))
    result = against_lerobot.measure(sys.executable, tmp_path, rounds=2, threads=1)
    assert result["versions"] == {"lerobot": "9.8", "torch": torch.__version__}
    assert len(result["seconds"]) == 2
    assert result["actions"] < 1e-5
    (line,) = against_lerobot.lines(result | {"seconds": [3.0, 5.0]}, own=2.0)
    assert "LeRobot 9.8" in line
    assert "4 s, 2.00 x" in line
    monkeypatch.setenv("LOSE_A_WEIGHT", "1")
    with pytest.raises(UserError, match=r"LeRobot did not load model.action_in_proj.bias"):
        against_lerobot.measure(sys.executable, tmp_path, rounds=1, threads=1)


def test_it_says_that_lerobot_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"LeRobot's pi0 did not run \(ModuleNotFoundError.*lerobot"):
        against_lerobot.measure(sys.executable, tmp_path, rounds=1, threads=1)
    assert "not installed here" in against_lerobot.lines(None, own=1.0)[0]
