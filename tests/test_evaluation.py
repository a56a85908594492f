"""Protocols are exams with a hash; an evaluation killed anywhere ends in the same table; outcomes are told apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pi0rl.cli import main
from pi0rl.errors import UserError, WorkerFailed
from pi0rl.evaluation.completeness import EPISODE_COLUMNS, require_complete
from pi0rl.evaluation.evaluator import ATTEMPTS, Exam, Play, Recording, examine, experiment_exam
from pi0rl.evaluation.journal import Journal
from pi0rl.evaluation.protocols import DEFAULT, LEROBOT, OPENPI, PROTOCOLS, RLINF, Protocol, protocol_named
from pi0rl.evaluation.statistics import episodes_to_separate, mcnemar
from pi0rl.evaluation.table import episode_row, episode_table, write_episode_table
from pi0rl.libero.failures import failure_kind
from pi0rl.libero.plan import Episode, episode_language, episode_task, with_permuted_instructions
from pi0rl.libero.simulation import Simulation
from pi0rl.libero.slots import EpisodeResult, SlotConfig, Slots
from pi0rl.libero.suites import official_init_states, suite_tasks, task
from pi0rl.params import load_params
from pi0rl.policy.checkpoints import save_policy
from pi0rl.policy.config import TINY
from pi0rl.policy.policy import create_policy
from pi0rl.policy.processing import mean_std, tiny_processing
from pi0rl.report.tables import p_value
from pi0rl.stages.compare import read_evaluation

SMALL = protocol_named(
    "default",
    ("episodes_per_task=4", "max_steps=8", "replan_steps=4", "camera_size=32", "render_profile=fast", "settle_steps=0"),
)


class OneTask(Exam):
    """An exam of the suite's first task alone."""

    def plan(self, split):
        return super().plan(split)[: self.protocol.episodes_per_task]


NO_VIDEOS = Recording()
EXAM = OneTask(SMALL, ("libero_object",), ("official", "held_out"), (0, 1))


@contextmanager
def open_slots(slot: SlotConfig, interrupt_after: int = 10**9) -> Iterator[Play]:
    """Real slots and a policy of noise keyed by seed, episode and chunk; Ctrl-C after some episodes."""
    slots = Slots(2, slot)
    finished = 0

    def play(
        rows: Sequence[Episode],
        seed: int,
        record: frozenset[int],
        on_results: Callable[[Sequence[EpisodeResult]], None],
    ) -> None:
        nonlocal finished
        look = slots.start(rows, record)
        while look.running:
            keys = zip(look.episode, look.chunk, strict=True)
            generators = [np.random.default_rng([seed, max(int(episode), 0), int(chunk)]) for episode, chunk in keys]
            known = len(slots.results)
            look = slots.step(np.stack([generator.uniform(-1, 1, (4, 7)) for generator in generators]))
            on_results(slots.results[known:])
            finished += len(slots.results) - known
            if finished >= interrupt_after:
                raise KeyboardInterrupt

    yield play


def _examined(folder: Path, recording: Recording = NO_VIDEOS, **kills: int) -> pd.DataFrame:
    journal = Journal(folder, "the same")
    examine(EXAM, "noise", lambda replan_steps: open_slots(EXAM.slot(), **kills), journal, recording)
    return episode_table(journal.rows("noise"), ["noise"])


def test_a_killed_evaluation_ends_in_the_same_table(tmp_path: Path) -> None:
    whole = _examined(tmp_path / "whole")
    require_complete(whole, EXAM.planned())
    assert len(whole) == 16
    assert set(EPISODE_COLUMNS) < set(whole.columns)
    killed = tmp_path / "killed"
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            _examined(killed, interrupt_after=3)
    with (killed / "episodes.jsonl").open("a") as journal:
        journal.write('{"policy": "noise", "spl')  # the line that a kill cut off
    resumed = _examined(killed)
    pd.testing.assert_frame_equal(resumed.drop(columns="seconds"), whole.drop(columns="seconds"))
    by_seed = whole[whole["split"] == "official"].groupby("seed")["final_state"].agg(list)
    assert by_seed[0] != by_seed[1]


@contextmanager
def open_failing(slot: SlotConfig, fails: Callable[[set[int]], bool], played: list[list[int]]) -> Iterator[Play]:
    """Slots whose worker fails instead of finishing the episodes at hand, once those before them are done."""
    with open_slots(slot) as play:

        def failing(
            rows: Sequence[Episode],
            seed: int,
            record: frozenset[int],
            on_results: Callable[[Sequence[EpisodeResult]], None],
        ) -> None:
            played.append([row.index for row in rows])
            if fails({row.index for row in rows}):
                raise WorkerFailed("an env worker died")
            play(rows, seed, record, on_results)

        yield failing


def test_an_episode_that_fails_its_workers_is_tried_again_found_and_named(tmp_path: Path) -> None:
    exam = OneTask(replace(SMALL, episodes_per_task=50), ("libero_object",), ("official",), (0,))
    journal, played = Journal(tmp_path, "one"), list[list[int]]()
    examine(
        exam, "noise", lambda _: open_failing(exam.slot(), lambda at_hand: 7 in at_hand, played), journal, NO_VIDEOS
    )
    table = episode_table(journal.rows("noise"), ["noise"])
    require_complete(table, exam.planned())
    assert table["index"].tolist() == list(range(50))
    assert table.query("error != ''")[["index", "error"]].to_numpy().tolist() == [[7, "an env worker died"]]
    assert played.count([7]) == ATTEMPTS
    assert len(Journal(tmp_path, "one").rows("noise")) == 49  # it is tried again by the next attempt


def test_a_worker_that_fails_now_and_then_costs_nothing_and_one_that_always_does_ends_the_run(tmp_path: Path) -> None:
    failures = iter([True, False, True])
    fails = lambda at_hand: next(failures, False)  # noqa: E731
    journal = Journal(tmp_path / "a", "one")
    examine(EXAM, "noise", lambda _: open_failing(EXAM.slot(), fails, []), journal, NO_VIDEOS)
    assert len(journal.rows("noise")) == 16
    assert not any(row["error"] for row in journal.rows("noise"))
    journal, played = Journal(tmp_path / "b", "one"), list[list[int]]()
    with pytest.raises(WorkerFailed, match="an env worker died"):
        examine(EXAM, "noise", lambda _: open_failing(EXAM.slot(), lambda at_hand: True, played), journal, NO_VIDEOS)
    assert len(played) < 10


def test_failures_are_played_again_for_their_videos(tmp_path: Path) -> None:
    table = _examined(tmp_path / "a", Recording(frozenset({0}), failures_per_kind=6))
    assert set(table["failure"]) == {"never grasped"}
    videos = table[table["video"] != ""]
    assert len(videos) == 6
    assert all((tmp_path / "a" / video).is_file() for video in videos["video"])
    plain = _examined(tmp_path / "b")
    pd.testing.assert_series_equal(table["final_state"], plain["final_state"])


@pytest.mark.parametrize(
    ("dies", "says"),
    [
        (False, "evaluate noise: 2 of 2 failures went another way when filmed; they have no video"),
        (True, "evaluate noise: 2 failures could not be filmed: an env worker died"),
    ],
)
def test_filming_a_failure_changes_no_outcome(
    dies: bool, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def open_fickle(replan_steps: int) -> Iterator[Play]:
        """All fail, and all would succeed if they were played again."""

        def play(
            rows: Sequence[Episode],
            seed: int,
            record: frozenset[int],
            on_results: Callable[[Sequence[EpisodeResult]], None],
        ) -> None:
            if record and dies:
                raise WorkerFailed("an env worker died")
            again = bool(record)
            for row in rows:
                on_results([EpisodeResult(row.index, again, 8, f"{again}", failure="" if again else "timeout")])

        yield play

    @contextmanager
    def open_nothing(replan_steps: int) -> Iterator[Play]:
        raise WorkerFailed("no worker starts")
        yield

    journal, recording = Journal(tmp_path, "one"), Recording(failures_per_kind=2)
    examine(EXAM, "noise", open_fickle, journal, recording)
    assert says in capsys.readouterr().err
    examine(EXAM, "noise", open_nothing, journal, recording)  # the same command once more: all outcomes are known
    table = episode_table(Journal(tmp_path, "one").rows("noise"), ["noise"])
    require_complete(table, EXAM.planned())
    assert not table["success_once"].any()
    assert set(table["video"]) == {""}


def test_a_journal_of_another_evaluation_is_dropped_and_errors_are_tried_again(tmp_path: Path) -> None:
    row = dict.fromkeys(EPISODE_COLUMNS, "") | {"policy": "sft", "split": "official", "seed": 0, "index": 3}
    journal = Journal(tmp_path / "parts", "one")
    journal.add(row | {"index": 4, "error": "the simulation diverged"})
    journal.add(row)
    assert len(journal.rows("sft")) == 2
    assert [kept["index"] for kept in Journal(tmp_path / "parts", "one").rows("sft")] == [3]
    assert Journal(tmp_path / "parts", "two").rows("sft") == []


def test_protocols_differ_where_the_harnesses_do() -> None:
    limits = {protocol.name: [rule.max_steps for rule in protocol.rules[:4]] for protocol in PROTOCOLS}
    assert limits == {
        "default": [220, 280, 300, 520],
        "openpi": [220, 280, 300, 520],
        "lerobot": [280, 280, 300, 520],
        "rlinf": [240, 280, 320, 520],
    }
    assert [protocol.settle_steps for protocol in PROTOCOLS] == [10, 10, 10, 15]
    assert (RLINF.rule("libero_10").replan_steps, RLINF.rule("libero_goal").replan_steps) == (10, 5)
    assert OPENPI.rule("libero_10_swap") == OPENPI.rule("libero_10")
    assert len({protocol.hash for protocol in PROTOCOLS}) == 4
    # A changed preset is a new exam: published hashes must never come to mean something else.
    assert [protocol.hash for protocol in (DEFAULT, OPENPI, LEROBOT, RLINF)] == [
        "bbd0eeddfb7f",
        "64a8705c71a5",
        "49b4eeeb8430",
        "b940e1740783",
    ]
    seeds = [episode.seed for episode in Exam(LEROBOT, ("libero_object",), ("official",), (0,)).plan("official")]
    assert seeds[:11] == [*range(1000, 1010), 1000]


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("opnpi", (), "--protocol opnpi: unknown, expected default, openpi, lerobot, rlinf"),
        ("openpi", ("horizon=5",), "--set horizon: no such key of a protocol, expected episodes_per_task"),
        ("openpi", ("camera_size=big",), "expected a positive whole number"),
        ("openpi", ("after_success=go",), "expected stop or continue"),
    ],
)
def test_a_bad_protocol_is_one_line(name: str, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        protocol_named(name, overrides)


def test_an_experiment_may_be_judged_on_both_splits_with_several_seeds(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(
        "evaluation: {split: both, num_seeds: 2, episodes_per_task: 3}\nactor: {model: {num_action_chunks: 8}}"
    )
    exam = experiment_exam(load_params(path))
    assert exam.planned() == {(split, seed): 30 for split in ("held_out", "official") for seed in (1000, 1001)}
    assert exam.protocol.rule("libero_object").replan_steps == 8
    more = experiment_exam(load_params(path, ("evaluation.suites=[libero_object, libero_goal]",)))
    assert more.planned()["official", 1000] == 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected an experiment (quickstart) or --checkpoint PATH_OR_HUB"),
        (("quickstart", "--checkpoint", "x"), "quickstart and --checkpoint exclude one another"),
        (("--checkpoint", "x", "--protocol", "opnpi"), "--protocol opnpi: unknown"),
        (("--checkpoint", "x", "--suites", "libero_objct"), "did you mean 'libero_object'?"),
        (("--checkpoint", "x", "--suites", "libero_10,libero_10"), "names libero_10 twice; expected each suite once"),
        (("--checkpoint", "x", "--seeds", "1,1"), "--seeds 1,1: expected different whole numbers"),
        (("--checkpoint", "x", "--set", "episodes_per_task=51"), "init states 0 to 50 asked for"),
        (("--checkpoint", "x", "--set", "instructions=other"), "--set instructions=other: expected own or permuted"),
        (("--checkpoint", "x", "--output", "."), "--output .: exists and holds no evaluation"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_permuted_instructions_are_all_others_and_another_exam(monkeypatch: pytest.MonkeyPatch) -> None:
    permuted = protocol_named("default", ("instructions=permuted",))
    assert permuted.hash != DEFAULT.hash == replace(permuted, instructions="own").hash
    exam = Exam(permuted, ("libero_goal", "libero_90"), ("official",), (0,))
    plan, plain = exam.plan("official"), Exam(DEFAULT, exam.suites, exam.splits, exam.seeds).plan("official")
    assert plan == exam.plan("official")
    assert tuple(replace(episode, instruction=None) for episode in plan) == plain
    for suite, init_state_id in (("libero_goal", 0), ("libero_goal", 1), ("libero_90", 0)):
        rows = [row for row in plan if (row.suite, row.init_state_id) == (suite, init_state_id)]
        assert {row.instruction for row in rows} == {row.task_id for row in rows}
        assert all(episode_language(row) != episode_task(row).language for row in rows)
    assert plan[0].instruction != plan[1].instruction or plan[0].instruction != plan[2].instruction
    other = Exam(replace(permuted, scene_seed=5), exam.suites, exam.splits, exam.seeds).plan("official")
    assert [row.instruction for row in other] != [row.instruction for row in plan]
    assert Slots(1, EXAM.slot()).start(plan[:1]).observation.prompt == (episode_language(plan[0]),)
    alike = [replace(goal, language="do it") for goal in suite_tasks("libero_goal")]
    monkeypatch.setattr("pi0rl.libero.plan.suite_tasks", lambda suite: alike)
    with pytest.raises(UserError, match="10 tasks have 1 different instructions"):
        with_permuted_instructions(plain, 0)


def test_a_policy_examined_with_permuted_instructions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pi0rl.stages.evaluate_checkpoint.Exam", OneTask)
    rng, prompts = np.random.default_rng(0), tuple(goal.language for goal in suite_tasks("libero_goal"))
    statistics = mean_std(rng.normal(size=(9, 8))), mean_std(rng.normal(size=(9, 7)))
    save_policy(create_policy(TINY, tiny_processing(TINY, *statistics, prompts), seed=0), tmp_path / "policy")
    changes = ("episodes_per_task=2", "max_steps=8", "replan_steps=8", "camera_size=64", "render_profile=fast")
    settings = [part for change in (*changes, "instructions=permuted") for part in ("--set", change)]
    command = ["evaluate", "--checkpoint", str(tmp_path / "policy"), "--suites", "libero_goal", "--workers", "1"]
    assert main([*command, *settings, "--output", str(tmp_path / "out")]) == 0
    assert "instructions=permuted" in capsys.readouterr().out
    table, evaluation = pd.read_parquet(tmp_path / "out/episodes.parquet"), read_evaluation(tmp_path / "out")
    plan = Exam(evaluation.protocol, ("libero_goal",), ("official",), (0,)).plan("official")[:2]
    assert table["language"].tolist() == [episode_language(episode) for episode in plan]
    assert set(table["language"]) <= {*prompts} - {prompts[0]}
    assert set(table["protocol"]) == {evaluation.protocol.hash}


def _evaluated(folder: Path, rate: float, protocol: Protocol = SMALL) -> Path:
    """The folder of an evaluation with made-up outcomes: 40 episodes of four tasks."""
    exam = Exam(replace(protocol, episodes_per_task=4), ("libero_object",), ("official",), (0,))
    solved = np.random.default_rng(int(100 * rate)).random(40) < rate
    rows = [
        episode_row(
            "policy",
            exam.protocol.hash,
            0,
            row,
            EpisodeResult(row.index, bool(solved[row.index]), 8, "", failure="" if solved[row.index] else "timeout"),
            "",
        )
        for row in exam.plan("official")
    ]
    folder.mkdir()
    write_episode_table(episode_table(rows, ["policy"]), folder / "episodes.parquet")
    described = {"protocol": asdict(exam.protocol) | {"hash": exam.protocol.hash}}
    described |= {"suites": exam.suites, "splits": exam.splits, "seeds": exam.seeds}
    (folder / "evaluation.json").write_text(json.dumps(described))
    return folder


def test_evaluations_of_one_protocol_are_compared_episode_by_episode(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weak, strong = _evaluated(tmp_path / "weak", 0.3), _evaluated(tmp_path / "strong", 0.9)
    assert main(["compare", str(weak), str(strong)]) == 0
    text = capsys.readouterr().out
    one, other = (pd.read_parquet(folder / "episodes.parquet") for folder in (weak, strong))
    test = mcnemar(one["success_once"].to_numpy(bool), other["success_once"].to_numpy(bool))
    assert test.n == 40
    needed = episodes_to_separate(test.gained / 40, test.lost / 40)
    line = f"| strong | official init states | Object | {100 * (test.gained - test.lost) / 40:+.1f} "
    assert f"{line}| {test.gained} | {test.lost} | {p_value(test.p)} | {p_value(test.p)} | {needed} |" in text
    assert text.index("| weak | official") < text.index("| strong | official")  # the one given first is the base
    other_exam = _evaluated(tmp_path / "other", 0.9, replace(SMALL, settle_steps=3))
    assert main(["compare", str(weak), str(other_exam)]) == 2
    assert main(["compare", str(weak), str(tmp_path)]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "different exams share no table" in first
    assert "no evaluation.json, expected a folder that `pi0rl evaluate --checkpoint ...` has written" in second


def _lacks(key: str, folder: Path) -> None:
    path = folder / "evaluation.json"
    described = json.loads(path.read_text())
    (described if key in described else described["protocol"]).pop(key)
    path.write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "evaluation.json").write_text('{"pro'), "evaluation.json: not readable as JSON"),
        (partial(_lacks, "protocol"), "evaluation.json: no 'protocol', expected protocol, suites, splits, seeds"),
        (partial(_lacks, "hash"), "evaluation.json: not this version's protocol ('hash'); evaluate again"),
        (lambda folder: (folder / "episodes.parquet").write_bytes(b"PAR1"), "parquet: not readable as Parquet"),
        (
            lambda folder: pd.DataFrame({"split": [0]}).to_parquet(folder / "episodes.parquet"),
            "episodes.parquet: no column 'policy'",
        ),
    ],
)
def test_a_damaged_evaluation_is_one_line(
    damage: Callable[[Path], object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(_evaluated(tmp_path / "damaged", 0.3))
    assert main(["compare", str(_evaluated(tmp_path / "whole", 0.3)), str(tmp_path / "damaged")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_task_without_any_outcome_supports_no_conclusion(tmp_path: Path) -> None:
    table = pd.read_parquet(_evaluated(tmp_path / "a", 0.5) / "episodes.parquet")
    many = pd.concat([table.assign(seed=seed) for seed in range(10)])
    many.loc[(many["seed"] == 3) & (many["task_id"] == 7), "error"] = "the simulation diverged"
    with pytest.raises(
        UserError, match=r"all episodes of 'policy' on libero_object task 7 .* seed 3\) ended in an error"
    ):
        require_complete(many, {("official", seed): 40 for seed in range(10)})


def test_changing_the_name_alone_keeps_the_hash() -> None:
    assert replace(OPENPI, name="ours").hash == OPENPI.hash
    changed = protocol_named("openpi", ("episodes_per_task=10",))
    assert changed.hash != OPENPI.hash
    assert changed.name == "openpi with episodes_per_task=10"


@pytest.mark.parametrize(("after_success", "steps"), [("stop", 1), ("continue", 8)])
def test_success_ends_an_episode_or_is_played_on(
    after_success: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    soup = task("libero_object", 0)
    simulation = Simulation(soup)
    simulation.reset(official_init_states(soup)[0])
    (test,) = simulation.goal
    state = official_init_states(soup)[0].copy()
    address = int(simulation.model.body(test.body).jntadr[0])
    qpos = 1 + int(simulation.model.jnt_qposadr[address])
    state[qpos : qpos + 3] = simulation.data.site_xpos[test.site]  # the soup begins in the basket
    monkeypatch.setattr("pi0rl.libero.slots.episode_init_state", lambda episode: state)
    exam = replace(EXAM, protocol=replace(SMALL, after_success=after_success))
    with open_slots(exam.slot()) as play:
        results: list[EpisodeResult] = []
        play(exam.plan("official")[:1], 0, frozenset(), results.extend)
    assert [(result.success, result.success_at_end, result.failure) for result in results] == [(True, True, "")]
    assert results[0].steps == steps


@pytest.mark.parametrize(
    ("held", "wanted", "missing", "kind"),
    [
        ([[0, 0], [0, 0]], [1, 0], [1, 0], "never grasped"),
        ([[0, 1], [0, 0]], [1, 0], [1, 0], "wrong object"),
        ([[1, 1], [0, 0]], [1, 0], [1, 0], "dropped"),
        ([[0, 0], [1, 0]], [1, 0], [1, 0], "timeout"),
        ([[1, 0], [0, 0]], [1, 1], [0, 1], "never grasped"),  # the first is in place, the second was never touched
        ([[1, 0], [0, 0]], [1, 0], [0, 0], "timeout"),  # in place, but the drawer is still open
        ([], [1, 0], [1, 0], "never grasped"),
    ],
)
def test_kinds_of_failure(held: list[list[int]], wanted: list[int], missing: list[int], kind: str) -> None:
    trace = np.array(held, dtype=bool).reshape(-1, 2)
    assert failure_kind(trace, np.array(wanted, bool), np.array(missing, bool)) == kind
