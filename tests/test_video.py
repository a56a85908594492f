"""Episode videos."""

from __future__ import annotations

from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from pi0rl.errors import UserError
from pi0rl.libero.plan import Episode
from pi0rl.libero.slots import EpisodeResult
from pi0rl.libero.video import write_video

EPISODE = Episode(0, "libero_spatial", 4, "official", 0, seed=0)


def test_video_shows_the_frames_and_its_bytes_depend_on_them_only(tmp_path: Path):
    frames = np.full((12, 192, 192, 3), 40, np.uint8)
    frames[6:, :, :96] = 200
    result = EpisodeResult(0, success=True, steps=23, final_state="", frames=frames)
    for name in ("first.mp4", "second.mp4"):
        write_video(tmp_path / name, result, EPISODE, info=True)
    assert (tmp_path / "first.mp4").read_bytes() == (tmp_path / "second.mp4").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.mp4", "second.mp4"]

    reader = imageio_ffmpeg.read_frames(str(tmp_path / "first.mp4"))
    properties = next(reader)
    shown = [np.frombuffer(frame, np.uint8).reshape(*properties["size"][::-1], 3) for frame in reader]
    assert len(shown) == 12
    assert properties["fps"] == 10
    assert abs(int(shown[-1][100, 20, 0]) - 200) < 5
    strip_before, strip_after = shown[0][192:].astype(int), shown[-1][192:].astype(int)
    assert strip_before.max() > 150, "text is written below the picture"
    assert abs(strip_before - strip_after).max() > 50, "the last frame says success"


def test_an_episode_that_was_not_recorded_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="was not recorded"):
        write_video(
            tmp_path / "none.mp4", EpisodeResult(0, success=False, steps=5, final_state=""), EPISODE, info=False
        )
