"""FAST tokens against the definition of its parts: scipy's cosine transform and the tokenizers library's byte pairs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.fft import dct

from pi0rl.errors import UserError
from pi0rl.policy.action_tokens import FastTokenizer, paligemma_ids, read_fast_tokenizer

SCALE, H, D = 10.0, 10, 7


def frequencies(chunk: np.ndarray) -> np.ndarray:
    return np.around(dct(chunk, axis=0, norm="ortho") * SCALE).astype(int)


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> FastTokenizer:
    """Trained as FAST is: byte pairs over the frequencies of smooth chunks."""
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("fast")
    seen = [frequencies(chunk) for chunk in chunks(np.random.default_rng(0), 200)]
    low = int(min(values.min() for values in seen))
    texts = ["".join(chr(value - low) for value in values.ravel()) for values in seen]
    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(texts, vocab_size=1024, min_frequency=2, show_progress=False)
    trainer.save(str(folder / "tokenizer.json"))
    (folder / "processor_config.json").write_text(json.dumps({"scale": SCALE, "min_token": low, "vocab_size": 1024}))
    return read_fast_tokenizer(folder)


def chunks(rng: np.random.Generator, count: int) -> np.ndarray:
    return np.clip(np.cumsum(rng.normal(scale=0.15, size=(count, H, D)), axis=1), -1, 1)


def test_chunks_survive_within_the_rounding_of_their_frequencies(fast: FastTokenizer) -> None:
    for chunk in chunks(np.random.default_rng(1), 20):
        ids = fast.encode(chunk)
        assert len(ids) < H * D  # shorter than one token a number
        assert max(ids) < fast.vocab_size
        decoded = fast.decode(ids, H, D)
        np.testing.assert_array_equal(np.maximum(frequencies(chunk), fast.min_token), frequencies(decoded))
        assert np.abs(decoded - chunk).max() < 0.5 / SCALE * np.sqrt(H)


def test_ids_count_down_from_the_end_of_paligemmas_vocabulary() -> None:
    ids = [0, 5, 1023]
    mapped = paligemma_ids(ids, 257152)
    assert mapped == [257023, 257018, 256000]
    assert paligemma_ids(mapped, 257152) == ids


def test_refusals(fast: FastTokenizer, tmp_path: Path) -> None:
    ids = fast.encode(chunks(np.random.default_rng(2), 1)[0])
    with pytest.raises(UserError, match=r"decode to 70 numbers, expected 9 x 7"):
        fast.decode(ids, 9, D)
    with pytest.raises(UserError, match=r"processor_config.json: not found"):
        read_fast_tokenizer(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"scale": 10}')
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"expected numbers scale and min_token, got 'min_token'"):
        read_fast_tokenizer(tmp_path)
