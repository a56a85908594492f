"""LIBERO's own HDF5 files as a source of demonstrations."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from tiny_demonstrations import SUITE, episode, refusal, request

from pi0rl.cli import main
from pi0rl.errors import UserError
from pi0rl.libero.suites import suite_tasks
from pi0rl.sft import importing
from pi0rl.sft.demonstrations import load
from pi0rl.sft.importing import import_demonstrations
from pi0rl.sft.recording import Recording


def write_hdf5(folder: Path, actions: int = 7, camera: str = "eye_in_hand_rgb") -> dict[str, Recording]:
    """Files as LIBERO's create_dataset.py writes them: what is seen stands beside the action that led there."""
    folder.mkdir()
    played = {}
    for task in suite_tasks(SUITE):
        recording = episode(task.task_id, 6, size=16)
        played[task.language] = recording
        with h5py.File(folder / f"{task.name}_demo.hdf5", "w") as file:
            data = file.create_group("data")
            data.attrs["problem_info"] = json.dumps({"language_instruction": [f'"{task.language}"']})
            data.attrs["macros_image_convention"] = "opengl"
            demo = data.create_group("demo_0")
            demo["actions"] = np.concatenate([np.zeros((1, actions)), recording.action[:-1, :actions]]).astype(float)
            demo["obs/ee_pos"] = recording.state[:, :3].astype(float)
            demo["obs/ee_ori"] = recording.state[:, 3:6].astype(float)
            demo["obs/gripper_states"] = recording.state[:, 6:].astype(float)
            demo["obs/agentview_rgb"], demo[f"obs/{camera}"] = recording.images[:, 0], recording.images[:, 1]
    return played


def test_liberos_own_files_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    played = write_hdf5(tmp_path / "hdf5")
    import_demonstrations(request(tmp_path / "hdf5", camera_size=16), tmp_path / "demos")
    demonstrations = load(tmp_path / "demos")
    for task, language in enumerate(demonstrations.languages):
        rows = np.flatnonzero(demonstrations.task == task)
        np.testing.assert_array_equal(demonstrations.state[rows], played[language].state[:-1])
        np.testing.assert_array_equal(demonstrations.actions[rows], played[language].action[:-1])
        np.testing.assert_array_equal(demonstrations.base_image[rows], played[language].images[:-1, 0])
    assert main(["dataset", "inspect", str(tmp_path / "hdf5")]) == 0
    assert "5 steps with images of 16 x 16 pixels\n10 episodes, 10 instructions" in capsys.readouterr().out


def test_unfit_hdf5_files_are_refused(tmp_path: Path) -> None:
    write_hdf5(tmp_path / "narrow", actions=6)
    with pytest.raises(UserError, match=r"demo_0/actions has shape \[6, 6\], expected LIBERO's \[6, 7\]"):
        import_demonstrations(request(tmp_path / "narrow"), tmp_path / "demos")
    write_hdf5(tmp_path / "blind", camera="front_rgb")
    with pytest.raises(UserError, match="demo_0 has no obs/eye_in_hand_rgb, expected LIBERO's"):
        import_demonstrations(request(tmp_path / "blind"), tmp_path / "demos")
    write_hdf5(tmp_path / "short")
    path = sorted((tmp_path / "short").iterdir())[0]
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="truncated, or not a file of LIBERO's demonstrations"):
        import_demonstrations(request(tmp_path / "short"), tmp_path / "demos")


def without_demos(data: h5py.Group) -> None:
    del data["demo_0"]


def renamed(data: h5py.Group) -> None:
    data.move("demo_0", "first")


def replaced(name: str, values: Any) -> Callable[[h5py.Group], None]:
    def change(data: h5py.Group) -> None:
        del data[name]
        data[name] = values

    return change


def attribute(name: str, value: str) -> Callable[[h5py.Group], None]:
    return lambda data: data.attrs.__setitem__(name, value)


HDF5: dict[str, tuple[Callable[[h5py.Group], None], str]] = {
    "no demos": (without_demos, "hdf5: no episodes; download"),
    "other names": (renamed, "data/first, expected demo_0, demo_1, ... alone"),
    "a file for a group": (replaced("demo_0", 1.0), "demo_0 has no actions, expected LIBERO's"),
    "no JSON": (attribute("problem_info", "{"), "attribute problem_info is no JSON object"),
    "no instruction": (attribute("problem_info", "{}"), "problem_info has no language_instruction"),
    "one gripper": (
        replaced("demo_0/obs/gripper_states", [0.0] * 6),
        r"demo_0/obs/gripper_states has shape \[6\], expected LIBERO's \[6, 2\]",
    ),
    "words for actions": (
        replaced("demo_0/actions", [[b"a"] * 7] * 6),
        "demo_0/actions holds object, expected numbers; download",
    ),
    "named actions": (
        replaced("demo_0/actions", np.zeros((6, 7), [("x", "f4")])),
        r"demo_0/actions holds \[\('x', '<f4'\)\], expected numbers; download",
    ),
    "too few looks": (
        replaced("demo_0/obs/agentview_rgb", np.zeros((5, 16, 16, 3), np.uint8)),
        r"demo_0/obs/agentview_rgb has shape \[5, 16, 16, 3\], expected LIBERO's \[6, any, any, 3\]",
    ),
    "another frequency": (
        attribute("env_args", json.dumps({"env_kwargs": {"control_freq": 10}})),
        "control_freq in env_args is 10, expected LIBERO's 20",
    ),
}


@pytest.mark.parametrize("case", HDF5)
def test_broken_hdf5_files_end_in_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hdf5(tmp_path / "hdf5")
    change, match = HDF5[case]
    for path in (tmp_path / "hdf5").iterdir():
        with h5py.File(path, "a") as file:
            change(file["data"])
    assert re.search(match, refusal(tmp_path / "hdf5", capsys))


def test_liberos_frequency_may_be_said(tmp_path: Path) -> None:
    write_hdf5(tmp_path / "hdf5")
    for path in (tmp_path / "hdf5").iterdir():
        with h5py.File(path, "a") as file:
            file["data"].attrs["env_args"] = json.dumps({"type": 1, "env_kwargs": {"control_freq": 20}})
    assert len(importing.open_source(tmp_path / "hdf5", 20).instructions) == 10
