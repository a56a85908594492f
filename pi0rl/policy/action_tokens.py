"""Normalised states and actions as discrete tokens: uniform bins, or FAST (frequencies, then byte pairs).

FAST: Pertsch et al. 2025, "FAST: Efficient Action Tokenization for Vision-Language-Action Models".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from pi0rl.errors import UserError

BINS = 256
# openpi and LeRobot keep PaliGemma's last ids free: special tokens, before which FAST's count downwards.
_RESERVED_IDS = 128


def bins(values: np.ndarray) -> np.ndarray:
    """Bins of normalised numbers, 256 uniform ones over [-1, 1): int64, -1 below the range, 255 above (as pi0.5's)."""
    return np.digitize(values, np.linspace(-1, 1, BINS + 1)[:-1]) - 1


def bin_centres(indices: np.ndarray) -> np.ndarray:
    """Middle of each bin, float64; the inverse of ``bins`` up to half a bin (1/256) inside [-1, 1)."""
    return (indices + 0.5) / (BINS / 2) - 1


@dataclass(frozen=True)
class FastTokenizer:
    """FAST as its processor files define it; reading them needs neither network nor anybody's code.

    Attributes:
        definition: ``tokenizer.json``, a byte-level byte-pair encoding over quantised frequencies.
        scale: frequencies are multiplied by it and rounded.
        min_token: the frequency written as character 0.
    """

    definition: str
    scale: float
    min_token: int

    @cached_property
    def _tokenizer(self):
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_str(self.definition)
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"tokenizer.json is not readable ({error}); download the FAST tokenizer again") from error

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""
        return self._tokenizer.get_vocab_size()

    def encode(self, actions: np.ndarray) -> list[int]:
        """Ids of one normalised chunk [H, D]; frequencies beyond the alphabet's lowest character are raised to it."""
        frequencies = np.around(_cosines(len(actions)) @ actions * self.scale).astype(np.int64)
        text = "".join(map(chr, np.maximum(frequencies - self.min_token, 0).ravel().tolist()))
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], horizon: int, action_dim: int) -> np.ndarray:
        """The chunk float64 [horizon, action_dim] that ``ids`` stand for; a UserError where they are of another."""
        characters = [ord(character) for character in self._tokenizer.decode(ids, skip_special_tokens=False)]
        if len(characters) != horizon * action_dim:
            raise UserError(
                f"FAST tokens decode to {len(characters)} numbers, expected {horizon} x {action_dim}; they are of "
                "another horizon or cut short"
            )
        frequencies = (np.array(characters) + self.min_token).reshape(horizon, action_dim)
        return _cosines(horizon).T @ (frequencies / self.scale)


def read_fast_tokenizer(directory: Path) -> FastTokenizer:
    """The FAST tokenizer of a local folder (as ``physical-intelligence/fast`` on the hub has it)."""
    config, definition = directory / "processor_config.json", directory / "tokenizer.json"
    for file in (config, definition):
        if not file.is_file():
            raise UserError(f"{file}: not found; expected a copy of physical-intelligence/fast (or one of its kind)")
    try:
        stored = json.loads(config.read_text())
        return FastTokenizer(definition.read_text(), float(stored["scale"]), int(stored["min_token"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{config}: expected numbers scale and min_token, got {error}; download it again") from error


def paligemma_ids(ids: list[int], vocab_size: int) -> list[int]:
    """FAST ids in PaliGemma's vocabulary of ``vocab_size``, and back: they count downwards from its end (openpi)."""
    return [vocab_size - 1 - _RESERVED_IDS - i for i in ids]


def _cosines(length: int) -> np.ndarray:
    """Orthonormal DCT-II matrix [length, length]: frequencies = matrix @ signal; its transpose is the inverse."""
    k, n = np.arange(length)[:, None], np.arange(length)[None]
    matrix = np.sqrt(2 / length) * np.cos(np.pi * k * (2 * n + 1) / (2 * length))
    matrix[0] /= np.sqrt(2)
    return matrix
