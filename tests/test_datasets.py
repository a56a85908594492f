"""Demonstrations in other formats: LeRobotDatasets written, read back and read by LeRobot, LIBERO's HDF5 files."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pi0rl.cli import main
from pi0rl.errors import UserError
from pi0rl.libero.suites import suite_tasks
from pi0rl.sft.assembling import assemble
from pi0rl.sft.demonstrations import Demonstrations, load
from pi0rl.sft.importing import Import, import_demonstrations
from pi0rl.sft.lerobot_dataset import INFO
from pi0rl.sft.lerobot_export import export
from pi0rl.sft.recording import Recording, part_name, save_part

SUITE, SIZE = "libero_goal", 32
LENGTHS = (5, 7)  # of the two episodes of every task


def episode(seed: int, length: int, size: int = SIZE) -> Recording:
    """Smooth pictures, brighter step by step and darker to one corner, so that any wrong turn or shift shows."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(20, 150, size)
    picture = ramp[:, None, None] + 0.3 * ramp[None, :, None] + np.array([0, 20, 40])
    steps = picture + 4.0 * np.arange(length)[:, None, None, None]
    images = np.stack([steps, 250 - steps], axis=1).astype(np.uint8)
    state = rng.normal(size=(length, 8)).astype(np.float32)
    return Recording(True, state, rng.uniform(-1, 1, size=(length, 7)).astype(np.float32), images)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of our own: two short episodes for each of ten tasks."""
    folder = tmp_path_factory.mktemp("own")
    parts, chosen = folder / "parts", []
    parts.mkdir()
    for task in suite_tasks(SUITE):
        for number, length in enumerate(LENGTHS):
            save_part(episode(10 * task.task_id + number, length), parts / part_name(task, number))
        chosen.append((task, [0, 1]))
    made = {"action_noise": 0.0, "split": "official", "seed": 0}
    (folder / "demos").mkdir()
    assemble({"fingerprint": "0" * 16, "collection": made}, SIZE, 1, chosen, parts, folder / "demos")
    return folder / "demos"


@pytest.fixture(scope="module")
def exported(own: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("lerobot") / "set"
    assert main(["dataset", "export", str(own), str(target)]) == 0
    return target


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def request(source: Path, **changes: Any) -> Import:
    usual = {"fps": 20, "suites": (SUITE,), "camera_size": SIZE, "episodes_per_task": 2}
    return Import(str(source), **(usual | changes))


def assert_same(one: Demonstrations, other: Demonstrations, pixels: float) -> None:
    np.testing.assert_array_equal(one.state, other.state)
    np.testing.assert_array_equal(one.actions, other.actions)
    np.testing.assert_array_equal(one.episode, other.episode)
    assert one.languages == other.languages
    assert one.card["norm_stats"] == other.card["norm_stats"]
    for mine, theirs in ((one.base_image, other.base_image), (one.wrist_image, other.wrist_image)):
        assert np.abs(mine.astype(int) - theirs).mean() < pixels


def test_a_set_survives_the_way_through_lerobots_format(own: Path, exported: Path, tmp_path: Path) -> None:
    card = import_demonstrations(request(exported), tmp_path / "back")
    assert_same(load(own), load(tmp_path / "back"), pixels=2.5)
    assert card["source"]["codebase_version"] == "v3.0"
    assert import_demonstrations(request(exported), tmp_path / "back") == card  # it is there: nothing to do
    few = import_demonstrations(request(exported, episodes_per_task=1), tmp_path / "few")
    assert [entry["steps"] for entry in few["episodes"]] == [LENGTHS[0]] * 10


def test_the_same_set_is_exported_to_the_same_bytes(own: Path, exported: Path, tmp_path: Path) -> None:
    export(own, tmp_path / "again")
    names = sorted(path.relative_to(exported) for path in exported.rglob("*") if path.is_file())
    assert Path("README.md") in names
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes()


def test_statistics_are_those_of_the_steps(own: Path, exported: Path) -> None:
    stats, demonstrations = json.loads((exported / "meta/stats.json").read_text()), load(own)
    np.testing.assert_allclose(stats["action"]["mean"], demonstrations.actions.mean(0, dtype=np.float64))
    np.testing.assert_allclose(stats["observation.state"]["std"], demonstrations.state.std(0, dtype=np.float64))
    pictures = demonstrations.base_image / 255.0
    np.testing.assert_allclose(np.ravel(stats["observation.images.image"]["mean"]), pictures.mean((0, 1, 2)))
    np.testing.assert_allclose(np.ravel(stats["observation.images.image"]["std"]), pictures.std((0, 1, 2)))


def test_pictures_inside_parquet_are_read_too(own: Path, copy: Path, tmp_path: Path) -> None:
    """As HuggingFaceVLA/libero keeps them: dtype image, PNG bytes in the data files, 10 frames a second."""
    info = json.loads((copy / INFO).read_text())
    demonstrations = load(own)
    info["fps"] = 10
    pictures = {
        "observation.images.image": demonstrations.base_image,
        "observation.images.image2": demonstrations.wrist_image,
    }
    for key in pictures:
        info["features"][key]["dtype"] = "image"
    (copy / INFO).write_text(json.dumps(info))
    for path in sorted((copy / "data").rglob("*.parquet")):
        table = pq.read_table(path)
        rows = table["index"].to_numpy()
        for key, images in pictures.items():
            cells = [{"bytes": png(images[row][::-1, ::-1]), "path": None} for row in rows]
            table = table.append_column(key, pa.array(cells))
        pq.write_table(table, path)
    shutil.rmtree(copy / "videos")
    import_demonstrations(request(copy, fps=10), tmp_path / "back")
    assert_same(demonstrations, load(tmp_path / "back"), pixels=1e-9)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, format="PNG")
    return buffer.getvalue()


def change_info(folder: Path, **changes: Any) -> None:
    info = json.loads((folder / INFO).read_text())
    (folder / INFO).write_text(json.dumps(info | changes))


def test_unfit_lerobot_datasets_are_refused(copy: Path, exported: Path, tmp_path: Path) -> None:
    info = json.loads((exported / INFO).read_text())
    features = info["features"]

    def refused(match: str, **changes: Any) -> None:
        change_info(copy, **(info | changes))
        with pytest.raises(UserError, match=match):
            import_demonstrations(request(copy), tmp_path / "refused")

    refused("codebase_version is v2.1, expected v3.x; convert it", codebase_version="v2.1")
    refused(r"fps is 10, expected 20.*set demos\.dataset\.fps: 10", fps=10)
    lacking = {key: value for key, value in features.items() if key != "observation.images.image2"}
    refused("no feature observation.images.image2 or", features=lacking)
    wide = features | {"action": {"dtype": "float32", "shape": [14], "names": None}}
    refused(r"action has shape \[14\], expected LIBERO's \[7\]", features=wide)
    change_info(copy, **info)
    with pytest.raises(UserError, match=r"no episode of libero_spatial task 0 .* choose the suites"):
        import_demonstrations(request(copy, suites=("libero_spatial",)), tmp_path / "refused")
    video = copy / "videos/observation.images.image/chunk-000/file-003.mp4"
    video.write_bytes(video.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"file-003\.mp4: no 7 frames of 32 x 32 pixels from frame 5 on"):
        import_demonstrations(request(copy), tmp_path / "refused")
    data = copy / "data/chunk-000/file-000.parquet"
    data.write_bytes(data.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"file-000\.parquet: truncated or not Parquet"):
        import_demonstrations(request(copy), tmp_path / "other")
    with pytest.raises(UserError, match="no such folder; expected one, or a hub id"):
        import_demonstrations(request(tmp_path / "nowhere"), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


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
    with pytest.raises(UserError, match=r"episode 0 has state \[5, 8\] and actions \[5, 6\], expected"):
        import_demonstrations(request(tmp_path / "narrow"), tmp_path / "demos")
    write_hdf5(tmp_path / "blind", camera="front_rgb")
    with pytest.raises(UserError, match="demo_0 has no obs/eye_in_hand_rgb, expected LIBERO's"):
        import_demonstrations(request(tmp_path / "blind"), tmp_path / "demos")
    write_hdf5(tmp_path / "short")
    path = sorted((tmp_path / "short").iterdir())[0]
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="truncated, or not a file of LIBERO's demonstrations"):
        import_demonstrations(request(tmp_path / "short"), tmp_path / "demos")


READ_BY_LEROBOT = """
import json, sys
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

dataset = LeRobotDataset("local/demos", root=sys.argv[1], video_backend="pyav")
assert dataset.num_episodes == 20 and dataset.fps == 20, dataset
last = dataset[len(dataset) - 1]
keys = ("observation.images.image", "observation.images.image2", "observation.state", "action")
found = {key: np.asarray(last[key], np.float64).tolist() for key in keys}
windows = LeRobotDataset("local/demos", root=sys.argv[1], video_backend="pyav", delta_timestamps={"action": [0, 0.05]})
found["window"] = np.asarray(windows[0]["action"]).tolist()
print(json.dumps(found | {"task": last["task"], "length": len(dataset)}))
"""


def test_lerobots_own_reader_opens_it(own: Path, exported: Path) -> None:
    """LeRobot needs other versions of nearly everything: name a Python that has lerobot[dataset] to run this."""
    python = os.environ.get("PI0RL_LEROBOT_PYTHON")
    if python is None:
        pytest.skip("PI0RL_LEROBOT_PYTHON names no Python that has lerobot[dataset]")
    command = [python, "-P", "-c", READ_BY_LEROBOT, str(exported)]
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    site = os.environ.get("PI0RL_LEROBOT_PYTHONPATH")
    environment = inherited | {"HF_HUB_OFFLINE": "1"} | ({} if site is None else {"PYTHONPATH": site})
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found, demonstrations = json.loads(done.stdout.splitlines()[-1]), load(own)
    assert found["length"] == len(demonstrations)
    assert found["task"] == demonstrations.languages[-1]
    np.testing.assert_allclose(found["action"], demonstrations.actions[-1])
    np.testing.assert_allclose(found["window"], demonstrations.actions[:2])
    shown = np.asarray(found["observation.images.image"]).transpose(1, 2, 0) * 255
    assert np.abs(shown - demonstrations.base_image[-1][::-1, ::-1]).mean() < 2.5
