"""The one evaluator: a policy plays the plans of an exam, and every finished episode becomes a row of the journal."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol as Interface

from pi0rl.errors import WorkerFailed
from pi0rl.evaluation.completeness import MAX_ERROR_SHARE, one_line
from pi0rl.evaluation.journal import Journal
from pi0rl.evaluation.protocols import Protocol, experiment_protocol
from pi0rl.evaluation.table import Row, episode_row
from pi0rl.libero.plan import Episode, Split, evaluation_plan, with_permuted_instructions
from pi0rl.libero.slots import EpisodeResult, SlotConfig
from pi0rl.libero.video import VideoConfig, write_video
from pi0rl.params import Params
from pi0rl.progress import Progress

# An episode without an outcome is played this often before that is what the table says of it.
ATTEMPTS = 3
# Recorded failures per kind and policy, whatever the suite, for the gallery of a report.
FAILURES_PER_KIND = 2

# What ``evaluation.split`` and ``--split`` mean; of both, the held-out states come first in every table.
SPLITS: dict[str, tuple[Split, ...]] = {
    "official": ("official",),
    "held_out": ("held_out",),
    "both": ("held_out", "official"),
}

# Split, seed, plan index.
EpisodeKey = tuple[str, int, int]


@dataclass(frozen=True)
class Exam:
    """What is played: every split with every seed is a pass over one plan of the suites."""

    protocol: Protocol
    suites: tuple[str, ...]
    splits: tuple[Split, ...]
    seeds: tuple[int, ...]

    def plan(self, split: Split) -> tuple[Episode, ...]:
        """The episodes of one pass.

        Raises:
            UserError: the split has fewer init states than the protocol asks for, a suite is unknown, or it has too few
                instructions to permute.
        """
        protocol = self.protocol
        plan = evaluation_plan(self.suites, split, protocol.episodes_per_task, protocol.scene_seed)
        if protocol.instructions == "permuted":
            plan = with_permuted_instructions(plan, protocol.scene_seed)
        if protocol.scene_seeds == "one":
            return plan
        return tuple(replace(episode, seed=protocol.scene_seed + episode.init_state_id) for episode in plan)

    def planned(self) -> dict[tuple[str, int], int]:
        """(split, seed) -> number of episodes."""
        return {(split, seed): len(self.plan(split)) for split in self.splits for seed in self.seeds}

    def slot(self) -> SlotConfig:
        """How its episodes are played."""
        protocol = self.protocol
        return SlotConfig(
            camera_size=protocol.camera_size,
            render_profile=protocol.render_profile,
            settle_steps=protocol.settle_steps,
            max_episode_steps=None,
            suite_steps=tuple((suite, protocol.rule(suite).max_steps) for suite in self.suites),
            after_success=protocol.after_success,
        )


def experiment_exam(params: Params) -> Exam:
    """The exam that an experiment's policies sit."""
    evaluation = params.evaluation
    seeds = tuple(range(evaluation.seed, evaluation.seed + evaluation.num_seeds))
    return Exam(experiment_protocol(params), params.evaluated_suites, SPLITS[evaluation.split], seeds)


@dataclass(frozen=True)
class Recording:
    """Which videos are made: ``episodes`` of every plan, and ``failures_per_kind`` of what fails besides."""

    episodes: frozenset[int] = frozenset()
    failures_per_kind: int = 0
    info: bool = True


class Play(Interface):
    """Plays rows of a plan with the policy's noise of ``seed``, and hands over results as episodes finish."""

    def __call__(
        self,
        rows: Sequence[Episode],
        seed: int,
        record: frozenset[int],
        on_results: Callable[[Sequence[EpisodeResult]], None],
    ) -> None: ...


def examine(
    exam: Exam,
    policy: str,
    open_play: Callable[[int], AbstractContextManager[Play]],
    journal: Journal,
    recording: Recording,
) -> None:
    """Bring the journal to where it holds every episode of ``exam`` for ``policy``.

    Args:
        exam: what to play.
        policy: its name in the table.
        open_play: replan steps -> what plays with them; opened only where episodes are missing.
        journal: finished episodes are taken from it and added to it.
        recording: which videos to make.
    """
    _Examination(exam, policy, journal, recording).run(open_play)


class _Examination:
    """One policy's way through an exam."""

    def __init__(self, exam: Exam, policy: str, journal: Journal, recording: Recording) -> None:
        self._exam, self._policy, self._journal, self._recording = exam, policy, journal, recording
        self._plans = {(split, seed): exam.plan(split) for split in exam.splits for seed in exam.seeds}
        self._done = {_key(row) for row in self._rows()}
        self._failed: Counter[EpisodeKey] = Counter()
        self._at_hand: list[EpisodeKey] = []
        self._progress = Progress(f"evaluate {policy}", self._planned, "episode", len(self._done))

    @property
    def _planned(self) -> int:
        return sum(map(len, self._plans.values()))

    def run(self, open_play: Callable[[int], AbstractContextManager[Play]]) -> None:
        rules = {suite: self._exam.protocol.rule(suite) for suite in self._exam.suites}
        for replan_steps in sorted({rule.replan_steps for rule in rules.values()}):
            suites = {suite for suite, rule in rules.items() if rule.replan_steps == replan_steps}
            share = self._planned
            while self._missing(suites) or self._failures(suites):
                self._at_hand = []
                try:
                    with open_play(replan_steps) as play:
                        self._play_missing(play, suites, share)
                        self._record_failures(play, suites)
                    break
                except WorkerFailed as failure:
                    if not self._missing(suites):  # every outcome is known: at most videos are not
                        if unfilmed := self._failures(suites):
                            self._say(f"{len(unfilmed)} failures could not be filmed: {one_line(str(failure))}")
                        break
                    share = self._smaller_share(failure)

    def _rows(self) -> list[Row]:
        return self._journal.rows(self._policy)

    def _missing(self, suites: set[str]) -> dict[tuple[str, int], list[Episode]]:
        """Episodes of ``suites`` without an outcome, by split and seed, where there are any."""
        missing = {
            (split, seed): [row for row in plan if row.suite in suites and (split, seed, row.index) not in self._done]
            for (split, seed), plan in self._plans.items()
        }
        return {key: rows for key, rows in missing.items() if rows}

    def _play_missing(self, play: Play, suites: set[str], share: int) -> None:
        """Play what is missing, ``share`` episodes at a time."""
        for (split, seed), rows in self._missing(suites).items():
            for first in range(0, len(rows), share):
                self._play(play, split, seed, rows[first : first + share])

    def _smaller_share(self, failure: WorkerFailed) -> int:
        """How many episodes to play at a time after a worker failed: ever fewer, until one is known to be at fault.

        Raises:
            WorkerFailed: nothing was at hand that could be left out, or too much would be.
        """
        left = [key for key in self._at_hand if key not in self._done]
        if not left:
            raise failure
        if len(left) > 1:
            return max(1, len(left) // 2)
        self._failed[left[0]] += 1
        if self._failed[left[0]] < ATTEMPTS:
            return 1
        split, seed, index = left[0]
        episode = self._plans[split, seed][index]
        result = EpisodeResult(index, success=False, steps=0, final_state="", error=one_line(str(failure)))
        self._journal.add(episode_row(self._policy, self._exam.protocol.hash, seed, episode, result, ""))
        self._done.add(left[0])
        if sum(bool(row["error"]) for row in self._rows()) > MAX_ERROR_SHARE * self._planned:
            raise failure  # no conclusion could be drawn, so the rest need not be played
        return self._planned

    def _play(self, play: Play, split: str, seed: int, rows: Sequence[Episode]) -> None:
        episodes = {row.index: row for row in rows}
        self._at_hand = [(split, seed, index) for index in episodes]

        def on_results(results: Sequence[EpisodeResult]) -> None:
            for result in results:
                episode = episodes[result.index]
                video = self._video(seed, episode, result)
                self._journal.add(episode_row(self._policy, self._exam.protocol.hash, seed, episode, result, video))
                self._done.add((split, seed, result.index))
            successes = sum(row["success_once"] for row in self._rows())
            self._progress.update(len(self._done), f"{successes}/{len(self._done)} successful")

        play(rows, seed, self._recording.episodes, on_results)

    def _video(self, seed: int, episode: Episode, result: EpisodeResult) -> str:
        """Write the episode's video, if it was filmed; its path, or empty."""
        if result.footage is None:
            return ""
        name = f"{self._policy}_{episode.suite}_{episode.task_id}_{episode.split}_{episode.init_state_id}_{seed}"
        video = f"videos/{name}.mp4"
        (self._journal.folder / "videos").mkdir(exist_ok=True)
        protocol = self._exam.protocol
        config = VideoConfig(protocol.camera_size, protocol.render_profile, info=self._recording.info)
        write_video(self._journal.folder / video, result, episode, config)
        return video

    def _failures(self, suites: set[str]) -> list[Row]:
        """Failed episodes of ``suites`` that are still to be recorded, so that every kind is shown often enough."""
        rows = sorted(self._rows(), key=lambda row: (row["init_state_id"], row["split"], row["seed"], row["index"]))
        failed = [row for row in rows if row["failure"] and row["suite"] in suites]
        shown = Counter(row["failure"] for row in rows if row["video"])  # of other suites too
        chosen = []
        for row in failed:
            if not row["video"] and shown[row["failure"]] < self._recording.failures_per_kind:
                shown[row["failure"]] += 1
                chosen.append(row)
        return chosen

    def _record_failures(self, play: Play, suites: set[str]) -> None:
        """Play failures again with a camera: the noise is keyed by episode, so they take the same course.

        Where rounding leads one elsewhere, which it may on a GPU, it has no video: an outcome stands as it was first
        played, or failures alone would have a second chance.
        """
        failed = self._failures(suites)
        for split, seed in self._plans:
            rows = {row["index"]: row for row in failed if (row["split"], row["seed"]) == (split, seed)}
            if rows:
                self._film(play, split, seed, rows)
        filmed = {_key(row) for row in self._rows() if row["video"]}
        if elsewhere := sum(_key(row) not in filmed for row in failed):
            self._say(f"{elsewhere} of {len(failed)} failures went another way when filmed; they have no video")

    def _film(self, play: Play, split: str, seed: int, rows: dict[int, Row]) -> None:
        plan = self._plans[split, seed]

        def on_results(results: Sequence[EpisodeResult]) -> None:
            for result in results:
                row = rows[result.index]
                if result.final_state == row["final_state"]:
                    self._journal.add(row | {"video": self._video(seed, plan[result.index], result)})

        play([plan[index] for index in sorted(rows)], seed, frozenset(rows), on_results)

    def _say(self, line: str) -> None:
        print(f"evaluate {self._policy}: {line}", file=sys.stderr)


def _key(row: Row) -> EpisodeKey:
    return row["split"], row["seed"], row["index"]
