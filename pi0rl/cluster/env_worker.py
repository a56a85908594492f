"""The env component: a Ray actor that owns simulations and never imports torch."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

import numpy as np

from pi0rl.libero.gl import prefer_gpu
from pi0rl.libero.plan import Episode
from pi0rl.libero.slots import EpisodeResult, Look, SlotConfig, Slots

# Episodes finished and slots running: all that the driver looks at; looks and actions pass it by reference.
Status = tuple[int, int]


class EnvWorker:
    """``stages`` groups of ``slots`` simulations each; while one group is being inferred, another simulates.

    ``gpu`` is the GPU of its node to render on; None: the first one, or the processor.
    """

    def __init__(self, config: SlotConfig, slots: int, stages: int, gpu: int | None = None) -> None:
        # Ctrl-C reaches the whole foreground group; ending is the driver's business.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if gpu is None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray may have left it empty, which hides the GPUs from EGL
        else:
            prefer_gpu(gpu)
        self._stages = [Slots(slots, config) for _ in range(stages)]

    def start(self, stage: int, rows: Sequence[Episode], record: frozenset[int]) -> tuple[Look, Status]:
        """Begin a list of rows; returns the first look."""
        return self._with_status(stage, self._stages[stage].start(rows, record))

    def step(self, stage: int, actions: np.ndarray) -> tuple[Look, Status]:
        """Execute ``actions`` [M, C, 7]; returns the next look."""
        return self._with_status(stage, self._stages[stage].step(actions))

    def _with_status(self, stage: int, look: Look) -> tuple[Look, Status]:
        return look, (len(self._stages[stage].results), look.running)

    def results_since(self, stage: int, known: int) -> list[EpisodeResult]:
        """The episodes that ``stage`` has finished after its first ``known`` ones, in the order they finished."""
        return self._stages[stage].results[known:]

    def seconds(self) -> dict[str, float]:
        """Seconds spent since ``start`` on reset, simulate and render."""
        keys = self._stages[0].seconds
        return {key: sum(slots.seconds[key] for slots in self._stages) for key in keys}
