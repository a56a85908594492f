"""Episode videos."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from pi0rl.errors import UserError
from pi0rl.libero.plan import Episode
from pi0rl.libero.slots import EpisodeResult, SlotConfig, Slots
from pi0rl.libero.video import VideoConfig, episode_pictures, write_video

EPISODE = Episode(0, "libero_goal", 7, "official", 0, seed=0)
CONFIG = VideoConfig(camera_size=32, render_profile="fast", view_size=96)


@pytest.fixture(scope="module")
def played() -> tuple[EpisodeResult, list[np.ndarray]]:
    """An episode of 7 steps and the images that the policy saw."""
    slots = Slots(1, SlotConfig(camera_size=32, render_profile="fast", settle_steps=2, max_episode_steps=7))
    look = slots.start([EPISODE], record=frozenset({0}))
    seen = []
    while look.running:
        seen.append(np.concatenate([look.observation.base_image[0][::-1], look.observation.wrist_image[0][::-1]]))
        look = slots.step(np.tile([0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0], (1, 5, 1)))
    return slots.results[0], seen


def test_pictures_show_what_the_policy_saw_beside_the_view(played: tuple[EpisodeResult, list[np.ndarray]]):
    result, seen = played
    assert result.footage is not None
    pictures = dict(episode_pictures(result.footage, EPISODE, CONFIG))
    assert list(pictures) == [2, 4, 6, 7]
    for step, look in ((2, 0), (4, 0), (6, 1), (7, 1)):
        assert pictures[step].shape == (96, 96 + 32, 3)
        np.testing.assert_array_equal(pictures[step][:64, 96:], seen[look])
    assert (pictures[2][:, :96] != pictures[4][:, :96]).any()
    alone = dict(episode_pictures(result.footage, EPISODE, replace(CONFIG, view_size=None)))
    np.testing.assert_array_equal(alone[7], seen[1])


def test_video_shows_the_episode_and_its_bytes_depend_on_it_only(
    played: tuple[EpisodeResult, list[np.ndarray]], tmp_path: Path
):
    assert played[0].footage is not None
    success = (False,) * 7 + (True,)
    result = replace(played[0], footage=replace(played[0].footage, success=success))
    for name in ("first.mp4", "second.mp4"):
        write_video(tmp_path / name, result, EPISODE, CONFIG)
    assert (tmp_path / "first.mp4").read_bytes() == (tmp_path / "second.mp4").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.mp4", "second.mp4"]

    reader = imageio_ffmpeg.read_frames(str(tmp_path / "first.mp4"))
    properties = next(reader)
    shown = [np.frombuffer(frame, np.uint8).reshape(*properties["size"][::-1], 3) for frame in reader]
    assert len(shown) == 4
    assert properties["fps"] == 10
    strip_before, strip_after = shown[0][96:].astype(int), shown[-1][96:].astype(int)
    assert strip_before.max() > 150, "text is written below the picture"
    assert abs(strip_before - strip_after).max() > 50, "the last frame says success"


def test_an_episode_that_was_not_recorded_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="was not recorded"):
        write_video(tmp_path / "none.mp4", EpisodeResult(0, success=False, steps=5, final_state=""), EPISODE, CONFIG)
