"""``evaluate/episodes.parquet``: both policies on one fixed plan; ``evaluate/videos``: some of its episodes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

from pi0rl.cluster.setup import players_config
from pi0rl.evaluation.completeness import require_complete
from pi0rl.evaluation.evaluator import FAILURES_PER_KIND, Exam, Recording, examine, experiment_exam
from pi0rl.evaluation.journal import Journal
from pi0rl.evaluation.table import episode_table, write_episode_table
from pi0rl.experiment import Experiment
from pi0rl.files import replace_directory
from pi0rl.libero.plan import Episode
from pi0rl.params import Params
from pi0rl.stages.playing import open_play, require_checkpoint


def run(experiment: Experiment) -> None:
    """Play and record; goes on where an interrupted evaluation of the same policies ended."""
    params = experiment.params
    exam = experiment_exam(params)
    stages = {"sft": "sft", params.algorithm.name: "train"}
    checkpoints = {name: experiment.stage_dir(stage) / "policy" for name, stage in stages.items()}
    for stage in stages.values():
        require_checkpoint(experiment.stage_dir(stage) / "policy", stage)
    journal = Journal(experiment.run_dir / ".evaluate.parts", _identity(exam, params, checkpoints))
    for name, checkpoint in checkpoints.items():
        config = replace(players_config(params, params.env.eval), slot=exam.slot())
        play = partial(open_play, params.cluster, config, checkpoint)
        # What the first policy's videos show, the second one's show too.
        others = {row["index"] for policy in checkpoints for row in journal.rows(policy) if row["video"]}
        recording = _recording(exam.plan(exam.splits[0]), params, others)
        examine(exam, name, lambda replan_steps, play=play: play(), journal, recording)
    table = episode_table((row for name in checkpoints for row in journal.rows(name)), checkpoints)
    require_complete(table, exam.planned())
    with replace_directory(experiment.stage_dir("evaluate")) as folder:
        write_episode_table(table, folder / "episodes.parquet")
        if (journal.folder / "videos").is_dir():
            shutil.copytree(journal.folder / "videos", folder / "videos")
    journal.remove()


def _recording(plan: tuple[Episode, ...], params: Params, others: set[int]) -> Recording:
    """The first episode of ``videos_per_policy`` tasks, spread over the plan, ``others``, and failures."""
    if not params.video_cfg.save_video:
        return Recording()
    firsts = [episode.index for episode in plan if episode.init_state_id == 0]
    count = min(params.evaluation.videos_per_policy, len(firsts))
    spread = {firsts[index * len(firsts) // count] for index in range(count)}
    return Recording(frozenset(spread | others), FAILURES_PER_KIND, params.video_cfg.info_on_video)


def _identity(exam: Exam, params: Params, checkpoints: dict[str, Path]) -> str:
    """All that decides the rows: the exam, the policies (their configs hold the weights' digests), how they act."""
    policies = {name: (path / "config.json").read_text() for name, path in checkpoints.items()}
    sections = params.model_dump(mode="json", include={"openpi", "actor", "video_cfg", "evaluation"})
    return json.dumps([exam.protocol.hash, exam.suites, exam.splits, exam.seeds, policies, sections])
