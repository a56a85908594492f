"""What a run was trained and evaluated on, as MLflow's datasets: by the hash in DVC's cache, by the protocol's hash."""

from __future__ import annotations

import json
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from pi0rl.experiment import Experiment

_DIGEST = 36  # MLflow keeps no more characters


def datasets(experiment: Experiment, results: dict[str, Any], hashes: dict[str, str]) -> list[DatasetInput]:
    """The demonstrations, if the experiment has some, and the episodes of every suite and split that were played.

    Args:
        experiment: whose they are.
        results: the content of its results.json.
        hashes: stage -> hash in DVC's cache.
    """
    found = []
    if "demos" in hashes:
        source = {"path": str(experiment.demos_dir.relative_to(experiment.root)), "md5": hashes["demos"]}
        suites = ", ".join(experiment.params.suites)
        found.append(_input(f"demonstrations of {suites}", hashes["demos"], "dvc", source, {}, "training"))
    for row in results["rows"]:
        if row["policy"] == results["rows"][0]["policy"]:  # all policies play the same episodes
            source = {"suite": row["suite"], "split": row["split"], "protocol": results.get("protocol", "")}
            name = f"{row['suite']} {row['split']}"
            found.append(_input(name, results.get("protocol", ""), "libero", source, {"episodes": row["n"]}, "eval"))
    return found


def _input(
    name: str, digest: str, kind: str, source: dict[str, Any], profile: dict[str, Any], context: str
) -> DatasetInput:
    dataset = Dataset(name, digest[:_DIGEST], kind, json.dumps(source), profile=json.dumps(profile))
    return DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, context)])
