"""Demonstrations in other formats: LeRobotDatasets written, read back and read by LeRobot; broken cards of our own."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_demonstrations import LENGTHS, SUITE, refusal, request, write_own

from pi0rl.cli import main
from pi0rl.errors import UserError
from pi0rl.libero.suites import suite_tasks
from pi0rl.sft import importing
from pi0rl.sft.demonstrations import Demonstrations, load
from pi0rl.sft.importing import import_demonstrations
from pi0rl.sft.lerobot_dataset import INFO, LerobotDataset
from pi0rl.sft.lerobot_export import export

# of the first task in an exported set
DATA, VIDEO = "data/chunk-000/file-000.parquet", "videos/observation.images.image/chunk-000/file-000.mp4"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of our own: two short episodes for each of ten tasks."""
    return write_own(tmp_path_factory.mktemp("own"), disturbed=[None, None], action_noise=0.0)


@pytest.fixture(scope="module")
def exported(own: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("lerobot") / "set"
    assert main(["dataset", "export", str(own), str(target)]) == 0
    return target


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


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


def test_what_is_imported_is_tied_to_what_the_files_hold(copy: Path, tmp_path: Path) -> None:
    first = import_demonstrations(request(copy), tmp_path / "demos")
    names = set(first["source"]["files"])
    assert {"meta/info.json", "meta/tasks.parquet", DATA, VIDEO} <= names
    one = set(LerobotDataset(copy, 20).described([0])["files"])  # every task has its own files here
    assert {DATA, VIDEO} <= one < names
    assert "data/chunk-000/file-001.parquet" in names - one
    table = pq.read_table(copy / DATA)
    other = np.stack(table["action"].to_pylist()) * np.float32(0.5)
    change_columns(copy / DATA, action=pa.FixedSizeListArray.from_arrays(pa.array(other.ravel()), 7))
    second = import_demonstrations(request(copy), tmp_path / "demos")
    assert second["fingerprint"] != first["fingerprint"]
    np.testing.assert_array_equal(load(tmp_path / "demos").actions[: len(other)], other)
    (copy / VIDEO).write_bytes((copy / VIDEO).read_bytes() + b"free space after the last box")
    assert import_demonstrations(request(copy), tmp_path / "demos")["fingerprint"] != second["fingerprint"]


def test_a_set_from_the_hub_is_recorded_with_its_commit(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = copy.rename(tmp_path / ("c0ffee" * 7)[:40])
    monkeypatch.setattr(importing, "hub_dataset", lambda source: snapshot)
    card = import_demonstrations(request(Path("org/name@main")), tmp_path / "demos")
    assert card["source"]["commit"] == snapshot.name
    export(tmp_path / "demos", tmp_path / "exported")
    readme = (tmp_path / "exported/README.md").read_text()
    assert "Taken over from `org/name@main`." in readme
    assert "license" not in readme


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("org/name@main", "org/name@main"),
        ("/somebody/sets/name", "name"),
        ("sets/name", "name"),
        ("../name@2", "name@2"),
        (".", "here"),
        ("..", "above"),
    ],
)
def test_a_card_without_a_commit_says_where_its_set_is_from(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, name: str
) -> None:
    """Of the hub, as it was named there; of a folder, its name alone."""
    (tmp_path / "above/here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "above/here")
    shutil.copytree(own, tmp_path / "demos")
    card = json.loads((own / "dataset.json").read_text())
    del card["collection"]
    card |= {"import": {"source": source}, "source": {}}
    (tmp_path / "demos/dataset.json").write_text(json.dumps(card))
    export(tmp_path / "demos", tmp_path / "exported")
    assert f"Taken over from `{name}`." in (tmp_path / "exported/README.md").read_text()


def test_vectors_may_be_lists_of_any_length(own: Path, copy: Path, tmp_path: Path) -> None:
    """As LeRobot's conversion of older sets leaves them, in any precision; an episode begins inside such a column."""
    table = pq.read_table(copy / DATA)
    assert len(table) == sum(LENGTHS)
    lists = {
        name: pa.array(table[name].to_pylist(), pa.list_(kind))
        for name, kind in (("action", pa.float64()), ("observation.state", pa.float32()))
    }
    change_columns(copy / DATA, **lists)
    import_demonstrations(request(copy), tmp_path / "back")
    assert_same(load(own), load(tmp_path / "back"), pixels=2.5)


def test_what_was_taken_is_said(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import_demonstrations(request(copy, episodes_per_task=1), tmp_path / "one")
    assert capsys.readouterr().err.endswith("; took 1 of 2 episodes per task (demos.episodes_per_task)\n")
    import_demonstrations(request(copy), tmp_path / "both")
    assert capsys.readouterr().err.endswith("; took 2 of 2 episodes per task\n")


def test_disturbed_steps_stay_known(tmp_path: Path) -> None:
    disturbed = [np.arange(length) % 3 == 1 for length in LENGTHS]
    write_own(tmp_path, disturbed=disturbed, action_noise=0.5)
    export(tmp_path / "demos", tmp_path / "lerobot")
    info = json.loads((tmp_path / "lerobot" / INFO).read_text())
    assert info["features"]["disturbed"] == {"dtype": "int64", "shape": [1], "names": None}
    readme = (tmp_path / "lerobot/README.md").read_text()
    assert "`disturbed`: 1 at steps" in readme
    assert "license: apache-2.0" in readme
    import_demonstrations(request(tmp_path / "lerobot"), tmp_path / "back")
    np.testing.assert_array_equal(load(tmp_path / "back").disturbed, np.tile(np.concatenate(disturbed), 10))
    export(tmp_path / "back", tmp_path / "again")
    readme = (tmp_path / "again/README.md").read_text()
    assert "Taken over from `lerobot`." in readme
    assert "license" not in readme
    assert "`disturbed`: 1 at steps" in readme
    assert str(tmp_path) not in readme


def test_undisturbed_sets_have_no_such_column(exported: Path, tmp_path: Path) -> None:
    assert "disturbed" not in json.loads((exported / INFO).read_text())["features"]
    assert "disturbed" not in (exported / "README.md").read_text()
    import_demonstrations(request(exported, episodes_per_task=1), tmp_path / "back")
    assert "disturbed" not in pq.read_schema(tmp_path / "back/steps.parquet").names


def test_statistics_are_those_of_the_steps(own: Path, exported: Path) -> None:
    stats, demonstrations = json.loads((exported / "meta/stats.json").read_text()), load(own)
    np.testing.assert_allclose(stats["action"]["mean"], demonstrations.actions.mean(0, dtype=np.float64))
    np.testing.assert_allclose(stats["observation.state"]["std"], demonstrations.state.std(0, dtype=np.float64))
    pictures = demonstrations.base_image / 255.0
    np.testing.assert_allclose(np.ravel(stats["observation.images.image"]["mean"]), pictures.mean((0, 1, 2)))
    np.testing.assert_allclose(np.ravel(stats["observation.images.image"]["std"]), pictures.std((0, 1, 2)))


def test_pictures_inside_parquet_are_read_too(own: Path, copy: Path, tmp_path: Path) -> None:
    """As HuggingFaceVLA/libero keeps them: dtype image, PNG bytes in the data files, 10 frames a second."""
    demonstrations = load(own)
    embed_pictures(copy, demonstrations)
    change_info(copy, fps=10)
    import_demonstrations(request(copy, fps=10), tmp_path / "back")
    assert_same(demonstrations, load(tmp_path / "back"), pixels=1e-9)


def embed_pictures(copy: Path, demonstrations: Demonstrations, cut: int | None = None) -> None:
    """Pictures in the data files, of which ``cut`` leaves the first bytes, instead of videos."""
    info = json.loads((copy / INFO).read_text())
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
            cells = [{"bytes": png(images[row][::-1, ::-1])[:cut], "path": None} for row in rows]
            table = table.append_column(key, pa.array(cells))
        pq.write_table(table, path)
    shutil.rmtree(copy / "videos")


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, format="PNG")
    return buffer.getvalue()


def change_info(folder: Path, **changes: Any) -> None:
    info = json.loads((folder / INFO).read_text())
    (folder / INFO).write_text(json.dumps(info | changes))


def change_columns(path: Path, **columns: pa.Array | None) -> None:
    """Columns of a Parquet file replaced, or taken out."""
    table = pq.read_table(path)
    for name, values in columns.items():
        table = table.drop_columns([name])
        table = table if values is None else table.append_column(name, values)
    pq.write_table(table, path)


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


def info_changed(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: change_info(folder, **changes)


def feature_changed(key: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        features = json.loads((folder / INFO).read_text())["features"]
        changed = {name: value for name, value in (features[key] | changes).items() if value is not None}
        change_info(folder, features=features | {key: changed})

    return change


def columns_changed(name: str, **columns: pa.Array | None) -> Callable[[Path], None]:
    return lambda folder: change_columns(folder / name, **columns)


def no_episodes(folder: Path) -> None:
    pq.write_table(pq.read_table(folder / EPISODES).slice(0, 0), folder / EPISODES)


def texts(*instructions: str) -> Callable[[Path], None]:
    table = pa.table({"task_index": list(range(len(instructions))), "task": list(instructions)})
    return lambda folder: pq.write_table(table, folder / "meta/tasks.parquet")


def pictures_by_path(folder: Path) -> None:
    rows = len(pq.read_table(folder / DATA))
    cells = pa.array([{"bytes": None, "path": "images/0.png"}] * rows, pa.struct({"bytes": pa.binary(), "path": "str"}))
    change_columns(folder / DATA, **{"observation.images.image": cells})


LEROBOT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "info is a list": (lambda folder: (folder / INFO).write_text("[]"), "info.json: a list, expected an obje"),
    "no features": (info_changed(features=None), "features is missing or no object of objects"),
    "another placeholder": (
        info_changed(data_path="data/{part}.parquet"),
        r"data_path is 'data/\{part\}.parquet', exp",
    ),
    "data elsewhere": (
        info_changed(data_path="/{chunk_index}/{file_index}"),
        "data_path is '/.*expected a path made of",
    ),
    "no video_path": (info_changed(video_path=None), r"video_path is None, expected a path made of \{video_key\}"),
    "no shape": (feature_changed("action", shape=None), r"action has shape None, expected LIBERO's \[7\]"),
    "no camera's shape": (
        feature_changed("observation.images.image", shape=None),
        "image is video None, expected a vi",
    ),
    "no dtype": (
        feature_changed("observation.images.image", dtype=None),
        r"image is None \[32, 32, 3\], expected a vi",
    ),
    "no episodes": (no_episodes, "copy: no episodes; download the whole data set"),
    "no tasks of episodes": (
        columns_changed(EPISODES, tasks=None),
        r"file-000.parquet: no column tasks; it has episode",
    ),
    "no file index": (columns_changed(EPISODES, **{"data/file_index": None}), "no column data/file_index; it has"),
    "no times of videos": (
        columns_changed(EPISODES, **{"videos/observation.images.image/from_timestamp": None}),
        "no column videos/observation.images.image/from_timestamp",
    ),
    "other lengths": (
        columns_changed(EPISODES, length=pa.array(["a"] * 20)),
        "column length is string, expected int64",
    ),
    "empty episodes": (
        columns_changed(EPISODES, length=pa.array([0] * 20)),
        "episode 0 has 1 instructions and 0 steps",
    ),
    "holes": (columns_changed(EPISODES, length=pa.array([None] * 20)), "column length has 20 empty cells"),
    "no state": (
        columns_changed(DATA, **{"observation.state": None}),
        "no column observation.state; it has action, tim",
    ),
    "narrow actions": (
        columns_changed(DATA, action=pa.array([[0.0]] * 12)),
        "column action is list<.*double>, exp",
    ),
    "other instructions": (
        texts("fly"),
        "does not list the instruction 'open the middle drawer .* columns task_index, t",
    ),
    "truncated pictures": (
        lambda folder: None,
        "image, episode 0: pictures cannot be read .*; download the file again",
    ),
    "pictures by path": (pictures_by_path, "image, episode 0: step 0 only names the file 'images/0.png', expected the"),
}


@pytest.mark.parametrize("case", LEROBOT)
def test_broken_lerobot_datasets_end_in_one_line(
    case: str, own: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, match = LEROBOT[case]
    if "pictures" in case:
        embed_pictures(copy, load(own), cut=-40 if case == "truncated pictures" else None)
    change(copy)
    assert re.search(match, refusal(copy, capsys))


def test_instructions_may_be_a_column(copy: Path) -> None:
    texts(*(task.language for task in suite_tasks(SUITE)))(copy)
    assert len(set(importing.open_source(copy, 20).instructions)) == 10


CARDS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no statistics": (lambda card: card.update(norm_stats=None), "norm_stats is missing or not dict"),
    "no files": (lambda card: card.pop("files"), "files is missing or not dict"),
    "no state": (lambda card: card["norm_stats"].pop("state"), "norm_stats.state.mean is missing or not 8 finite num"),
    "no mean": (lambda card: card["norm_stats"]["actions"].pop("mean"), "norm_stats.actions.mean is missing or not 7"),
    "short": (
        lambda card: card["norm_stats"]["actions"].update(q99=[1.0]),
        "norm_stats.actions.q99 is missing or not 7",
    ),
    "not numbers": (
        lambda card: card["norm_stats"]["state"].update(std=["a"] * 8),
        "norm_stats.state.std is missing or",
    ),
    "infinite": (
        lambda card: card["norm_stats"]["state"].update(std=[float("inf")] * 8),
        "state.std is missing or not 8",
    ),
}


@pytest.mark.parametrize("case", CARDS)
def test_broken_cards_end_in_one_line(case: str, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, match = CARDS[case]
    card = json.loads((own / "dataset.json").read_text())
    change(card)
    (tmp_path / "dataset.json").write_text(json.dumps(card))
    assert re.search(match, refusal(tmp_path, capsys))


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
