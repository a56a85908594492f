"""Episode videos: mp4 with what happens written below the picture; the same frames give the same bytes."""

from __future__ import annotations

import os
import subprocess
import textwrap
from collections.abc import Sequence
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pi0rl.errors import UserError
from pi0rl.libero.plan import Episode, episode_task
from pi0rl.libero.slots import EpisodeResult

# LIBERO's control frequency.
_STEPS_PER_SECOND = 20
_FONT_SIZE = 10
_LINE_HEIGHT = 13
_CHARACTER_WIDTH = 5.5
_MAX_TASK_LINES = 3


def write_video(path: Path, result: EpisodeResult, episode: Episode, info: bool, stride: int = 2) -> None:
    """Write the recorded frames of an episode, in real time.

    Args:
        path: The mp4 file; replaced if it exists.
        result: The episode's outcome and frames, upright.
        episode: Its row of the plan.
        info: Whether to write task, step, reward and success below the picture.
        stride: Control steps between frames.

    Raises:
        UserError: The episode has no frames.
    """
    if result.frames is None:
        raise UserError(f"episode {result.index} of {episode.suite} was not recorded: no frames for {path}")
    frames: Sequence[np.ndarray] = list(result.frames)
    if info:
        task = episode_task(episode)
        last = len(frames) - 1
        frames = [
            annotated(
                frame,
                f"{task.suite} {task.task_id}: {task.language}",
                step=result.steps if index == last else (index + 1) * stride,
                reward=float(result.success and index == last),
                success=result.success and index == last,
            )
            for index, frame in enumerate(frames)
        ]
    encode(path, np.stack(frames), _STEPS_PER_SECOND / stride)


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


def encode(path: Path, frames: np.ndarray, frames_per_second: float) -> None:
    """Write uint8 [n, H, W, 3] as H.264; H and W are padded to even numbers.

    Raises:
        RuntimeError: The encoder failed; the message is its last line.
    """
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)))
    height, width = frames.shape[1:3]
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    source = [
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-s",
        f"{width}x{height}",
        "-r",
        f"{frames_per_second:g}",
        "-i",
        "-",
    ]
    # One thread and no encoder names in the file: the bytes depend on the frames only.
    coding = ["-c:v", "libx264", "-crf", "23", "-preset", "veryfast", "-pix_fmt", "yuv420p", "-threads", "1"]
    plain = ["-fflags", "+bitexact", "-flags:v", "+bitexact", "-map_metadata", "-1", "-movflags", "+faststart"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y", *source, *coding, *plain, "-f", "mp4"]
    finished = subprocess.run([*command, str(temporary)], input=frames.tobytes(), capture_output=True)
    if finished.returncode:
        temporary.unlink(missing_ok=True)
        message = finished.stderr.decode(errors="replace").strip().splitlines()
        raise RuntimeError(
            f"{path}: ffmpeg ended with {finished.returncode}: {message[-1] if message else 'no message'}"
        )
    temporary.replace(path)
