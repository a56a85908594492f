"""Instructions to token ids: the checkpoint's own tokenizer, or a small built-in one for the tiny model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import numpy as np

from pi0rl.errors import UserError, first_line
from pi0rl.policy.action_tokens import bins

PAD_ID = 0

# Every word of the instructions of LIBERO's 130 tasks.
_LIBERO_WORDS = """
akita alphabet and at back basket bbq between black book both bottle bottom bowl box butter cabinet caddy center cheese
chocolate close compartment cookie cookies cream drawer dressing from front frying in inside it juice ketchup layer left
microwave middle milk moka mug next of off on open orange pan pick place plate pot pots pudding push put rack ramekin
red right salad sauce shelf soup stack stove table the them to tomato top tray turn under up white wine wooden yellow
"""
LIBERO_WORDS = tuple(_LIBERO_WORDS.split())

PromptStyle = Literal["text", "text_and_state", "lerobot_text"]
"""``text``: BOS, cleaned text, newline (openpi's pi0, and pi05_libero); ``text_and_state``: pi0.5's "Task: ..., State:
..."; ``lerobot_text``: LeRobot's pi0, which does not clean the text."""


class Tokenizer(Protocol):
    """What processing needs of a tokenizer. Padding has id 0 in all of them."""

    @property
    def bos_id(self) -> int:
        """The id every prompt starts with."""
        ...

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without BOS or EOS."""
        ...


@dataclass(frozen=True)
class WordTokenizer:
    """One id per known word, ignoring case; the newline and all unknown words have an id each."""

    words: tuple[str, ...] = LIBERO_WORDS

    UNKNOWN_ID = 1
    NEWLINE_ID = 3
    FIRST_WORD_ID = 4

    @property
    def bos_id(self) -> int:
        return 2

    @property
    def vocab_size(self) -> int:
        return self.FIRST_WORD_ID + len(self.words)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {"\n": self.NEWLINE_ID} | {word: self.FIRST_WORD_ID + i for i, word in enumerate(self.words)}

    def encode(self, text: str) -> list[int]:
        return [self._ids.get(word, self.UNKNOWN_ID) for word in re.findall(r"\n|[^\s]+", text.lower())]


@dataclass(frozen=True)
class SentencePieceTokenizer:
    """A SentencePiece model (``tokenizer.model``), as PaliGemma has it."""

    model: bytes

    @cached_property
    def _processor(self):
        try:
            import sentencepiece
        except ImportError as error:
            raise UserError(
                "this checkpoint's tokenizer needs the package sentencepiece: pip install sentencepiece"
            ) from error
        try:
            return sentencepiece.SentencePieceProcessor(model_proto=self.model)
        except RuntimeError as error:
            raise UserError(
                f"tokenizer.model is not a SentencePiece model ({error}); fetch the checkpoint again"
            ) from error

    @property
    def bos_id(self) -> int:
        return self._processor.bos_id()

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)


@dataclass(frozen=True)
class HuggingFaceTokenizer:
    """A ``tokenizer.json`` of the tokenizers library, as LeRobot ships it."""

    definition: str

    @cached_property
    def _tokenizer(self):
        from tokenizers import Tokenizer as FastTokenizer

        try:
            return FastTokenizer.from_str(self.definition)
        except Exception as error:  # the library raises nothing more specific
            raise UserError(
                f"tokenizer.json is not a tokenizer ({first_line(error)}), truncated or foreign; fetch it again"
            ) from error

    @property
    def bos_id(self) -> int:
        bos = self._tokenizer.token_to_id("<bos>")
        if bos is None:
            raise UserError("tokenizer.json has no token <bos>; expected the PaliGemma tokenizer")
        return bos

    @property
    def vocab_size(self) -> int:
        """Of the ids that words become: PaliGemma's adds ``<image>`` behind the last id its network embeds."""
        return 1 + max(self.bos_id, *self._tokenizer.get_vocab(with_added_tokens=False).values())

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids


def clean_prompt(text: str) -> str:
    """Strip, then underscores and newlines to blanks; case, punctuation and inner blanks stay (openpi)."""
    return text.strip().replace("_", " ").replace("\n", " ")


def prompt_text(style: PromptStyle, text: str, state: np.ndarray) -> str:
    """The string that is tokenised, for one normalised, un-padded state [n]."""
    if style == "text_and_state":
        return f"Task: {clean_prompt(text)}, State: {' '.join(str(b) for b in bins(state))};\nAction: "
    if style == "lerobot_text":
        return text if text.endswith("\n") else text + "\n"
    return clean_prompt(text)


def prompt_ids(tokenizer: Tokenizer, style: PromptStyle, text: str, state: np.ndarray) -> list[int]:
    """Ids of a whole prompt: BOS, text and, in style ``text``, a newline encoded by itself."""
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt_text(style, text, state))]
    return ids + tokenizer.encode("\n") if style == "text" else ids


def pad_ids(ids: list[int], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut or pad to ``length``: ids int64 [length], valid bool [length]; a cut loses the end, as in openpi."""
    kept = ids[:length]
    tokens = np.full(length, PAD_ID, dtype=np.int64)
    tokens[: len(kept)] = kept
    return tokens, np.arange(length) < len(kept)
