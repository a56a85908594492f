"""Reading LIBERO's own demonstrations: a folder of ``<task>_demo.hdf5`` files, as LIBERO's download script leaves them.

LIBERO recorded what was seen *after* each action. So an action is put beside the step before it, and the first action
and the last look of an episode fall away.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pi0rl.errors import UserError, first_line
from pi0rl.sft.demonstrations import ACTION_DIM, FPS, file_digest
from pi0rl.sft.sources import SourceEpisode

SUFFIX = "_demo.hdf5"
STATE = ("obs/ee_pos", "obs/ee_ori", "obs/gripper_states")
ACTIONS = "actions"
BASE, WRIST = "obs/agentview_rgb", "obs/eye_in_hand_rgb"
# What an episode of T steps consists of, and the shape of a step; None is any length.
SHAPES: dict[str, tuple[int | None, ...]] = {
    ACTIONS: (ACTION_DIM,),
    **dict(zip(STATE, ((3,), (3,), (2,)), strict=True)),
    BASE: (None, None, 3),
    WRIST: (None, None, 3),
}


class LiberoHdf5:
    """A folder of LIBERO's HDF5 files; an :class:`~pi0rl.sft.sources.EpisodeSource`.

    Raises:
        UserError: a file is not one of LIBERO's, or of another frequency or shape.
    """

    format = "libero-hdf5"

    def __init__(self, directory: Path):
        self.name = str(directory)
        self._places: list[tuple[Path, str]] = []
        instructions: list[str] = []
        for path in sorted(directory.glob(f"*{SUFFIX}")):
            with _opened(path) as demos:
                instruction = _instruction(path, demos)
                _check_conventions(path, demos)
                names = _names(path, demos)
                for name in names:
                    _check_arrays(path, name, demos[name])
                self._places += [(path, name) for name in names]
                instructions += [instruction] * len(names)
        self.instructions = tuple(instructions)

    def described(self, episodes: Iterable[int]) -> dict[str, Any]:
        paths = sorted({self._places[episode][0] for episode in episodes})
        return {"format": self.format, "files": {path.name: file_digest(path) for path in paths}}

    def read(self, episode: int) -> SourceEpisode:
        path, name = self._places[episode]
        with _opened(path) as demos:
            demo = demos[name]
            return SourceEpisode(
                state=np.concatenate([np.asarray(demo[key], np.float32) for key in STATE], axis=1)[:-1],
                actions=np.asarray(demo[ACTIONS], np.float32)[1:],
                base_image=np.asarray(demo[BASE])[:-1],
                wrist_image=np.asarray(demo[WRIST])[:-1],
            )


@contextmanager
def _opened(path: Path) -> Iterator[h5py.Group]:
    """The group ``data`` of a file."""
    try:
        with h5py.File(path) as file:
            if not isinstance(file["data"], h5py.Group):
                raise KeyError("data is no group")
            yield file["data"]
    except (OSError, KeyError) as error:
        reason = first_line(error).strip("'\"")  # the quotes that a KeyError puts around its text
        raise UserError(
            f"{path}: truncated, or not a file of LIBERO's demonstrations ({reason}); download it again"
        ) from error


def _names(path: Path, demos: h5py.Group) -> list[str]:
    """The episodes in their order."""
    other = next((name for name in demos if not re.fullmatch(r"demo_\d+", name)), None)
    if other is not None:
        raise UserError(f"{path}: data/{other}, expected demo_0, demo_1, ... alone; rename it or take it out")
    return sorted(demos, key=lambda name: int(name.removeprefix("demo_")))


def _check_arrays(path: Path, name: str, demo: h5py.Group) -> None:
    steps = None
    for key, shape in SHAPES.items():
        values = demo.get(key) if isinstance(demo, h5py.Group) else None
        if values is None or not isinstance(values, h5py.Dataset) or values.shape is None:
            raise UserError(f"{path}: {name} has no {key}, expected LIBERO's {', '.join(SHAPES)}; download it again")
        if values.dtype.kind not in "fiu":
            raise UserError(f"{path}: {name}/{key} holds {values.dtype}, expected numbers; download the file again")
        found = values.shape
        steps = found[0] if steps is None and found else steps
        wanted = (steps, *shape)
        if len(found) != len(wanted) or any(b not in (a, None) for a, b in zip(found, wanted, strict=True)):
            expected = ", ".join("any" if side is None else str(side) for side in wanted)
            raise UserError(
                f"{path}: {name}/{key} has shape {list(found)}, expected LIBERO's [{expected}]; leave it out"
            )


def _check_conventions(path: Path, demos: h5py.Group) -> None:
    """The images' and the control frequency, where the file says them."""
    convention = demos.attrs.get("macros_image_convention", "opengl")
    if convention != "opengl":
        raise UserError(f"{path}: macros_image_convention is {convention}, expected LIBERO's opengl (upside down)")
    if "env_args" in demos.attrs:
        arguments = _attribute(path, demos, "env_args").get("env_kwargs")
        frequency = arguments.get("control_freq", FPS) if isinstance(arguments, dict) else FPS
        if frequency != FPS:
            raise UserError(
                f"{path}: control_freq in env_args is {frequency}, expected LIBERO's {FPS}; actions of another length "
                "cannot be imitated here, take demonstrations that were recorded at it"
            )


def _instruction(path: Path, demos: h5py.Group) -> str:
    text = _attribute(path, demos, "problem_info").get("language_instruction")
    if isinstance(text, list):
        text = " ".join(str(word) for word in text)
    if not isinstance(text, str):
        raise UserError(f"{path}: problem_info has no language_instruction, expected a text; download it again")
    return text.strip().strip('"').strip()


def _attribute(path: Path, demos: h5py.Group, name: str) -> dict[str, Any]:
    """A JSON attribute of the file's ``data``."""
    try:
        content = json.loads(demos.attrs[name])
    except (ValueError, TypeError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: attribute {name} is no JSON object, expected LIBERO's; download the file again")
    return content
