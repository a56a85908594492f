"""Reading LIBERO's own demonstrations: a folder of ``<task>_demo.hdf5`` files, as LIBERO's download script leaves them.

LIBERO recorded what was seen *after* each action. So an action is put beside the step before it, and the first action
and the last look of an episode fall away.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from pi0rl.errors import UserError
from pi0rl.sft.demonstrations import file_digest
from pi0rl.sft.sources import SourceEpisode

SUFFIX = "_demo.hdf5"
COLUMNS = ("ee_pos", "ee_ori", "gripper_states")
BASE, WRIST = "agentview_rgb", "eye_in_hand_rgb"


class LiberoHdf5:
    """A folder of LIBERO's HDF5 files; an :class:`~pi0rl.sft.sources.EpisodeSource`.

    Raises:
        UserError: a file is not one of LIBERO's.
    """

    def __init__(self, directory: Path):
        self.name = str(directory)
        self._places: list[tuple[Path, str]] = []
        instructions: list[str] = []
        files = sorted(directory.glob(f"*{SUFFIX}"))
        for path in files:
            with _opened(path) as demos:
                instruction = _instruction(path, demos)
                names = sorted(demos, key=lambda name: int(name.removeprefix("demo_")))
                self._places += [(path, name) for name in names]
                instructions += [instruction] * len(names)
        self.instructions = tuple(instructions)
        self.described = {"format": "libero-hdf5", "files": {path.name: file_digest(path) for path in files}}

    def read(self, episode: int) -> SourceEpisode:
        path, name = self._places[episode]
        with _opened(path) as demos:
            seen, actions = demos[f"{name}/obs"], demos[f"{name}/actions"]
            lacking = [key for key in (*COLUMNS, BASE, WRIST) if key not in seen]
            if lacking:
                raise UserError(
                    f"{path}: {name} has no obs/{lacking[0]}, expected LIBERO's {', '.join((*COLUMNS, BASE, WRIST))}"
                )
            columns = [np.asarray(seen[key], np.float32) for key in COLUMNS]
            return SourceEpisode(
                state=np.concatenate(columns, axis=1)[:-1],
                actions=np.asarray(actions, np.float32)[1:],
                base_image=np.asarray(seen[BASE])[:-1],
                wrist_image=np.asarray(seen[WRIST])[:-1],
            )


@contextmanager
def _opened(path: Path) -> Iterator[h5py.Group]:
    """The group ``data`` of a file."""
    try:
        with h5py.File(path) as file:
            yield file["data"]
    except (OSError, KeyError) as error:
        reason = str(error).strip("'\"").splitlines()[0]
        raise UserError(
            f"{path}: truncated, or not a file of LIBERO's demonstrations ({reason}); download it again"
        ) from error


def _instruction(path: Path, demos: h5py.Group) -> str:
    """The file's instruction, its images' convention checked."""
    convention = demos.attrs.get("macros_image_convention", "opengl")
    if convention != "opengl":
        raise UserError(f"{path}: macros_image_convention is {convention}, expected LIBERO's opengl (upside down)")
    text = json.loads(demos.attrs["problem_info"])["language_instruction"]
    return (" ".join(text) if isinstance(text, list) else text).strip().strip('"').strip()
