"""What a set of demonstrations of somebody else's has to offer, whatever its format."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pi0rl.sft.demonstrations import ACTION_DIM, STATE_DIM


@dataclass(frozen=True)
class SourceEpisode:
    """One episode of T control steps, each with what the policy would have seen before its action.

    Attributes:
        state: float32 [T, 8], end-effector position (m), axis-angle (rad), finger joints (m).
        actions: float32 [T, 7], in the environment's units, in [-1, 1].
        base_image, wrist_image: uint8 [T, h, w, 3], as LIBERO renders (upside down).
        disturbed: bool [T], whether something else than the action was executed; None where the set does not say.
    """

    state: np.ndarray
    actions: np.ndarray
    base_image: np.ndarray
    wrist_image: np.ndarray
    disturbed: np.ndarray | None = None

    def problem(self) -> str | None:
        """What is wrong with it, or None."""
        steps = len(self.state)
        if self.state.shape != (steps, STATE_DIM) or self.actions.shape != (steps, ACTION_DIM):
            return (
                f"state {list(self.state.shape)} and actions {list(self.actions.shape)}, expected [{steps}, "
                f"{STATE_DIM}] and [{steps}, {ACTION_DIM}]"
            )
        if steps == 0 or not (np.isfinite(self.state).all() and np.isfinite(self.actions).all()):
            return f"{steps} steps, expected one at least and finite numbers alone"
        if np.abs(self.actions).max() > 1.0 + 1e-6:
            return f"actions up to {np.abs(self.actions).max():.3g}, expected LIBERO's in [-1, 1]"
        for name, images in (("base", self.base_image), ("wrist", self.wrist_image)):
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[0] != steps or images.shape[3] != 3:
                return f"{name} images {images.dtype} {list(images.shape)}, expected uint8 [{steps}, h, w, 3]"
        return None


class EpisodeSource(Protocol):
    """A set of demonstrations that is there.

    Attributes:
        name: what to call it in messages.
        format: what its files are.
        instructions: one for every episode.
    """

    name: str
    format: str
    instructions: tuple[str, ...]

    def described(self, episodes: Iterable[int]) -> dict[str, Any]:
        """What these episodes are read from, for the card: the format, and the digest of every file.

        Raises:
            UserError: a file is missing.
        """
        ...

    def read(self, episode: int) -> SourceEpisode:
        """The episode at an index into ``instructions``.

        Raises:
            UserError: a file is missing, truncated or of another shape.
        """
        ...
