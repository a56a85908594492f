"""Episode videos: mp4 with what happens written below the picture; the same frames give the same bytes."""

from __future__ import annotations

import os
import subprocess
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pi0rl.errors import UserError
from pi0rl.libero.plan import Episode, episode_language, episode_task
from pi0rl.libero.rendering import PROFILES, Renderer
from pi0rl.libero.slots import EpisodeResult, Footage

# LIBERO's control frequency.
_STEPS_PER_SECOND = 20
_POLICY_CAMERAS = ("agentview", "robot0_eye_in_hand")
_FONT_SIZE = 10
_LINE_HEIGHT = 13
_CHARACTER_WIDTH = 5.5
_MAX_TASK_LINES = 3
Coding = tuple[str, ...]
# ffmpeg's options: small files for people, or pictures to learn from, of which any can be read without many others.
WATCHED: Coding = ("-crf", "23", "-preset", "veryfast")
LEARNED_FROM: Coding = ("-crf", "18", "-preset", "veryfast", "-g", "2", "-bf", "0")


@dataclass(frozen=True)
class VideoConfig:
    """How recorded episodes become pictures.

    Attributes:
        camera_size, render_profile: what the policy was shown, so that its pictures come out as it saw them.
        view_size: pixels of a third-person view beside them; None leaves it out.
        info: whether to write task, step, reward and success below.
        stride: control steps between frames.
    """

    camera_size: int
    render_profile: Literal["reference", "fast"]
    view_size: int | None = 192
    info: bool = True
    stride: int = 2


def write_video(path: Path, result: EpisodeResult, episode: Episode, config: VideoConfig) -> None:
    """Draw a recorded episode and write it in real time.

    Args:
        path: The mp4 file; replaced if it exists.
        result: The episode's outcome and footage.
        episode: Its row of the plan.
        config: What to show.

    Raises:
        UserError: The episode was not recorded, or nothing can be drawn here.
    """
    if result.footage is None:
        raise UserError(f"episode {result.index} of {episode.suite} was not recorded: no pictures for {path}")
    task, frames = episode_task(episode), []
    for step, picture in episode_pictures(result.footage, episode, config):
        if config.info:
            success = result.footage.success[step]
            title = f"{task.suite} {task.task_id}: {episode_language(episode)}"
            picture = annotated(picture, title, step, reward=float(success), success=success)
        frames.append(picture)
    encode(path, np.stack(frames), _STEPS_PER_SECOND / config.stride)


def episode_pictures(footage: Footage, episode: Episode, config: VideoConfig) -> Iterator[tuple[int, np.ndarray]]:
    """(control step, picture) of every `stride`-th step and the last one.

    A picture, uint8 [H, W, 3], is upright (LIBERO's stand on their heads) and shows from the left: the third-person
    view at that step, if wanted, and the two images that the policy saw last, one above the other.
    """
    task, last = episode_task(episode), len(footage.states) - 1
    shown = Renderer(config.camera_size, PROFILES[config.render_profile])
    view = None if config.view_size is None else Renderer(config.view_size, PROFILES[config.render_profile])
    seen, looked = np.empty(0), None
    for step in sorted({*range(config.stride, last, config.stride), last}):
        look = max(look for look in footage.looks if look <= step)
        if look != looked:
            state, looked = footage.states[look], look
            images = [shown.render(task, episode.seed, state, camera)[::-1] for camera in _POLICY_CAMERAS]
            seen = np.concatenate(images)
        columns = [seen]
        if view is not None:
            columns.insert(0, view.render(task, episode.seed, footage.states[step], "agentview")[::-1])
        height = max(len(column) for column in columns)
        padded = [np.pad(column, ((0, height - len(column)), (0, 0), (0, 0))) for column in columns]
        yield step, np.concatenate(padded, axis=1)


def annotated(frame: np.ndarray, title: str, step: int, reward: float, success: bool) -> np.ndarray:
    """The frame, uint8 [H, W, 3], on top of a strip with title, step, reward and success; uint8 [H + strip, W, 3]."""
    height, width = frame.shape[:2]
    lines = textwrap.wrap(title, max(1, int(width / _CHARACTER_WIDTH)), max_lines=_MAX_TASK_LINES, placeholder=" ...")
    # Always as high as the longest text needs, so that all frames and videos have one size.
    strip = (_MAX_TASK_LINES + 1) * _LINE_HEIGHT + 4
    picture = Image.new("RGB", (width, height + strip))
    picture.paste(Image.fromarray(np.ascontiguousarray(frame)), (0, 0))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(_FONT_SIZE)
    for row, line in enumerate(lines):
        draw.text((3, height + 2 + row * _LINE_HEIGHT), line, fill="white", font=font)
    status = f"step {step}  reward {reward:g}  {'success' if success else 'running'}"
    position = (3, height + 2 + _MAX_TASK_LINES * _LINE_HEIGHT)
    draw.text(position, status, fill="lightgreen" if success else "orange", font=font)
    return np.asarray(picture)


def encode(path: Path, frames: Sequence[np.ndarray] | np.ndarray, fps: float, coding: Coding = WATCHED) -> None:
    """Write uint8 [n, H, W, 3] as H.264, frame after frame; H and W are padded to even numbers.

    Raises:
        RuntimeError: The encoder failed; the message is its last line.
    """
    height, width = (side + side % 2 for side in frames[0].shape[:2])
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{fps:g}", "-i", "-"]
    # One thread and no encoder names in the file: the bytes depend on the frames only.
    codec = ["-c:v", "libx264", *coding, "-pix_fmt", "yuv420p", "-threads", "1"]
    plain = ["-fflags", "+bitexact", "-flags:v", "+bitexact", "-map_metadata", "-1", "-movflags", "+faststart"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y", *source, *codec, *plain, "-f", "mp4"]
    process = subprocess.Popen([*command, str(temporary)], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # the encoder has ended, and said why
        for frame in frames:
            rows, columns = frame.shape[:2]
            process.stdin.write(np.pad(frame, ((0, height - rows), (0, width - columns), (0, 0))).tobytes())
    said = process.communicate()[1]
    if process.returncode:
        temporary.unlink(missing_ok=True)
        raise RuntimeError(f"{path}: ffmpeg ended with {process.returncode}: {_last_line(said)}")
    temporary.replace(path)


def decode(path: Path, size: tuple[int, int], fps: float, start: int, count: int) -> np.ndarray:
    """Frames ``start`` to ``start + count`` of a video of a constant frame rate, uint8 [count, height, width, 3].

    Raises:
        UserError: The file is missing or damaged, ends early, or shows pictures of another size.
    """
    if not path.is_file():
        raise UserError(f"{path}: not found; download the whole data set")
    # Half a frame early, since what is sought is the first frame not before that time.
    seek = ["-ss", f"{(start - 0.5) / fps:.6f}"] if start else []
    wanted = ["-frames:v", str(count), "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-threads", "1", *seek, "-i", str(path), *wanted]
    finished = subprocess.run(command, capture_output=True)
    expected = count * size[0] * size[1] * 3
    if finished.returncode or len(finished.stdout) != expected:
        reason = _last_line(finished.stderr) if finished.stderr.strip() else f"{len(finished.stdout)} bytes"
        raise UserError(
            f"{path}: no {count} frames of {size[1]} x {size[0]} pixels from frame {start} on ({reason}); "
            "download the file again"
        )
    return np.frombuffer(finished.stdout, np.uint8).reshape(count, *size, 3)


def _last_line(said: bytes) -> str:
    lines = said.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no message"
