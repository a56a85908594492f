"""LIBERO observations to network inputs, and network outputs to actions. It is stored inside every checkpoint.

A policy that differs in one of these steps acts at 0 %, so each exists once, here; the image rotation too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from pi0rl.errors import UserError
from pi0rl.observation import Observation
from pi0rl.policy.config import Pi0Config
from pi0rl.policy.model import ModelInputs
from pi0rl.policy.tokenizer import PromptStyle, Tokenizer, WordTokenizer, pad_ids, prompt_ids

ENV_ACTION_DIM = 7
# Actions are relative to these leading state entries (position and axis-angle) where delta_actions is set.
_DELTA_DIMS = 6
_OPENPI_EPS = 1e-6
_LEROBOT_EPS = 1e-8


@dataclass(frozen=True)
class Normalisation:
    """Per-dimension statistics and how they are applied.

    Attributes:
        method: ``mean_std``: first = mean, second = std; ``quantile``: percentiles 1 and 99, mapped to [-1, 1].
        convention: ``openpi``: float64, 1e-6 added to every scale; ``lerobot``: float32, 1e-8 on std going in only, and
            on a quantile range of zero.
    """

    method: Literal["mean_std", "quantile"]
    first: tuple[float, ...]
    second: tuple[float, ...]
    convention: Literal["openpi", "lerobot"] = "openpi"

    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        dtype = np.float64 if self.convention == "openpi" else np.float32
        return np.asarray(self.first, dtype), np.asarray(self.second, dtype)

    def _quantile_range(self) -> np.ndarray:
        low, high = self._arrays()
        if self.convention == "openpi":
            return high - low + _OPENPI_EPS
        return np.where(high == low, np.float32(_LEROBOT_EPS), high - low)

    def forward(self, x: np.ndarray) -> np.ndarray:
        """[..., n] with n <= the number of statistics -> normalised, float64 (openpi) or float32 (lerobot)."""
        width = x.shape[-1]
        first, second = (array[:width] for array in self._arrays())
        x = x.astype(first.dtype)
        if self.method == "quantile":
            scaled = (x - first) / self._quantile_range()[:width]
            return scaled * 2 - 1
        return (x - first) / (second + (_OPENPI_EPS if self.convention == "openpi" else np.float32(_LEROBOT_EPS)))

    def inverse(self, y: np.ndarray) -> np.ndarray:
        """Undo ``forward`` on the leading dimensions of y [..., m]; those without statistics pass unchanged."""
        first, second = self._arrays()
        width = min(y.shape[-1], len(first))
        first, second, known = first[:width], second[:width], y[..., :width]
        if self.method == "quantile":
            known = (known + 1) / 2 * self._quantile_range()[:width] + first
        else:
            known = known * (second + (_OPENPI_EPS if self.convention == "openpi" else 0)) + first
        return np.concatenate((known, y[..., width:].astype(known.dtype)), axis=-1)


def mean_std(values: np.ndarray) -> Normalisation:
    """Statistics of rows [N, n] (population std), for data of one's own."""
    values = values.astype(np.float64)
    return Normalisation("mean_std", tuple(values.mean(0).tolist()), tuple(values.std(0).tolist()))


def resize_pil(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 [B, h, w, 3] -> uint8 [B, size, size, 3], aspect kept, black borders; Pillow's bilinear (openpi, RLinf)."""
    height, width = images.shape[1:3]
    if (height, width) == (size, size):
        return images
    ratio = max(width / size, height / size)
    new_width, new_height = int(width / ratio), int(height / ratio)
    left, top = (size - new_width) // 2, (size - new_height) // 2
    out = np.zeros((len(images), size, size, 3), dtype=np.uint8)
    for target, image in zip(out, images, strict=True):
        resized = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR)
        target[top : top + new_height, left : left + new_width] = np.asarray(resized)
    return out


def resize_torch(images: torch.Tensor, size: int, border: float) -> torch.Tensor:
    """float [B, 3, h, w] -> [B, 3, size, size], bilinear without antialiasing, borders of a constant (LeRobot's)."""
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    ratio = max(width / size, height / size)
    new = int(height / ratio), int(width / ratio)
    resized = F.interpolate(images, size=new, mode="bilinear", align_corners=False)
    top, left = (size - new[0]) // 2, (size - new[1]) // 2
    return F.pad(resized, (left, size - new[1] - left, top, size - new[0] - top), value=border)


@dataclass(frozen=True)
class Processing:
    """Everything between LIBERO and the network.

    Attributes:
        image_size: side the network takes.
        state_dim, action_dim: widths the network takes; states and actions are zero padded to them.
        token_len: language positions the network is given, fixed so that shapes never depend on the prompt.
        tokenizer, prompt_style: how instructions become ids.
        state_norm, action_norm: statistics.
        resize: ``pil`` on uint8 (openpi, RLinf) or ``torch`` on floats (LeRobot).
        delta_actions: the network predicts actions minus state[:6] (openpi's pi0_libero).
        absent_camera: also feed the third camera LIBERO does not have, black and masked. Only RLinf's mean-token and
            last-token critics on the prefix look at it.
    """

    image_size: int
    state_dim: int
    action_dim: int
    token_len: int
    tokenizer: Tokenizer
    state_norm: Normalisation
    action_norm: Normalisation
    prompt_style: PromptStyle = "text"
    resize: Literal["pil", "torch"] = "pil"
    delta_actions: bool = False
    absent_camera: bool = False

    def inputs(self, observation: Observation) -> ModelInputs:
        """B observations -> inputs on the CPU."""
        state = self.state(observation.state)
        tokens, valid = self.tokens(observation.prompt, state)
        cameras = [self.image(observation.base_image), self.image(observation.wrist_image)]
        present = [True, True]
        if self.absent_camera:
            cameras.append(torch.full_like(cameras[0], -1.0))
            present.append(False)
        return ModelInputs(
            images=torch.stack(cameras, dim=1),
            image_mask=torch.tensor(present).expand(len(observation), -1),
            tokens=torch.from_numpy(tokens),
            token_mask=torch.from_numpy(valid),
            state=torch.from_numpy(_zero_pad(state, self.state_dim).astype(np.float32)),
        )

    def image(self, images: np.ndarray) -> torch.Tensor:
        """uint8 [B, h, w, 3] as LIBERO renders -> float32 [B, 3, R, R] in [-1, 1], rotated by 180 degrees."""
        upright = images[:, ::-1, ::-1]
        if self.resize == "pil":
            pixels = np.ascontiguousarray(resize_pil(upright, self.image_size).transpose(0, 3, 1, 2))
            return torch.from_numpy(pixels).to(torch.float32) / 255.0 * 2.0 - 1.0
        pixels = np.ascontiguousarray(upright.transpose(0, 3, 1, 2))
        return resize_torch(torch.from_numpy(pixels).to(torch.float32) / 255.0, self.image_size, 0.0) * 2.0 - 1.0

    def state(self, state: np.ndarray) -> np.ndarray:
        """Normalised state [B, 8], not padded."""
        return self.state_norm.forward(state)

    def tokens(self, prompts: tuple[str, ...], state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64 and validity bool, both [B, token_len]; ``state`` is normalised (some prompts spell it out)."""
        rows = [
            pad_ids(prompt_ids(self.tokenizer, self.prompt_style, prompt, row), self.token_len)
            for prompt, row in zip(prompts, state, strict=True)
        ]
        return np.stack([ids for ids, _ in rows]), np.stack([valid for _, valid in rows])

    def env_actions(self, actions: np.ndarray | torch.Tensor, observation: Observation) -> np.ndarray:
        """Network actions [B, C, action_dim] -> LIBERO's actions float64 [B, C, 7] for the looks they belong to."""
        if isinstance(actions, torch.Tensor):
            actions = actions.detach().cpu().numpy()
        raw = self.action_norm.inverse(actions)[..., :ENV_ACTION_DIM].astype(np.float64)
        if self.delta_actions:
            raw[..., :_DELTA_DIMS] += observation.state[:, None, :_DELTA_DIMS]
        return raw

    def targets(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        """LIBERO actions [B, H, 7] and raw states [B, 8] -> what the network predicts, float64 [B, H, action_dim]."""
        return _zero_pad(self.action_norm.forward(self.relative(actions, state)), self.action_dim)

    def relative(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        """LIBERO actions [B, H, 7] in float64, minus the raw states [B, 8] where the network predicts that."""
        actions = actions.astype(np.float64)
        if self.delta_actions:
            actions[..., :_DELTA_DIMS] -= state[:, None, :_DELTA_DIMS]
        return actions


def _zero_pad(x: np.ndarray, width: int) -> np.ndarray:
    if x.shape[-1] > width:
        raise UserError(
            f"a vector of {x.shape[-1]} numbers does not fit the network's {width}; check the policy's config"
        )
    return np.concatenate((x, np.zeros((*x.shape[:-1], width - x.shape[-1]), x.dtype)), axis=-1)


def tiny_processing(
    config: Pi0Config, state_norm: Normalisation, action_norm: Normalisation, prompts: tuple[str, ...]
) -> Processing:
    """Processing of a policy trained from scratch on tasks with these prompts; its tokens end with the longest."""
    tokenizer = WordTokenizer()
    no_state = np.zeros(0)
    longest = max(len(prompt_ids(tokenizer, "text", prompt, no_state)) for prompt in prompts)
    return Processing(
        image_size=config.vision.image_size,
        state_dim=config.state_dim,
        action_dim=config.action_dim,
        token_len=min(longest, config.max_token_len),
        tokenizer=tokenizer,
        state_norm=state_norm,
        action_norm=action_norm,
    )
