"""What the simulator shows to the policy at a chunk boundary."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Observation:
    """A batch of B observations, exactly as LIBERO gives them.

    Attributes:
        base_image: uint8 [B, S, S, 3], camera ``agentview``, in the orientation LIBERO renders (not rotated).
        wrist_image: uint8 [B, S, S, 3], camera ``robot0_eye_in_hand``, likewise.
        state: float32 [B, 8]: end-effector position (m), orientation as axis-angle (rad), two finger joints (m).
        prompt: B task descriptions in LIBERO's own words.
    """

    base_image: np.ndarray
    wrist_image: np.ndarray
    state: np.ndarray
    prompt: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompt)
