"""The results of a finished experiment in MLflow: columns, a table, a nested run per suite, and a model version.

So the list of runs, sorted and filtered, is the comparison. The registered model of a list of suites and a protocol
holds a version per run; its alias ``candidate`` is the newest one, ``champion`` the best that the evaluation's rule
lets through. Results under another protocol are another exam, so they are another model's.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

TABLE = "results.json"
CHECKPOINT = "checkpoint"
ALPHA = 0.05  # of the paired test, in the rule for a champion


def log_results(client: MlflowClient, run_id: str, results: dict[str, Any], hashes: dict[str, str]) -> None:
    """Log the content of a results.json to a run; what the run has already is not logged again.

    Args:
        client: of the tracking server.
        run_id: the experiment's run.
        results: ``rows``, ``comparisons``, ``protocol`` as the report writes them.
        hashes: stage -> hash in DVC's cache.
    """
    client.log_batch(run_id, metrics=_metrics(_columns(results)))
    if TABLE not in {file.path for file in client.list_artifacts(run_id)}:  # logged again, a table grows
        client.log_table(run_id, pd.DataFrame(results["rows"]).drop(columns="wilson"), TABLE)
    for suite in dict.fromkeys(row["suite"] for row in results["rows"]):
        _log_suite(client, run_id, suite, results)
    if "train" in hashes:
        _register(client, run_id, results, hashes)


def _columns(results: dict[str, Any]) -> dict[str, float]:
    """``success/<policy>``, the mean over suites of the judged split, and the comparison of the trained policy's."""
    split = _judged_split(results)
    rates: dict[str, list[float]] = {}
    for row in results["rows"]:
        if row["split"] == split:
            rates.setdefault(row["policy"], []).append(row["k"] / row["n"])
    columns = {f"success/{policy}": fmean(of_suites) for policy, of_suites in rates.items()}
    return columns | _comparison(results, "all", split, columns)


def _judged_split(results: dict[str, Any]) -> str:
    """Held-out episodes where there are some: the report puts them first."""
    return results["rows"][0]["split"]


def _comparison(results: dict[str, Any], suite: str, split: str, success: dict[str, float]) -> dict[str, float]:
    """``before``, ``after``, ``change``, ``mcnemar_p``: the same columns whatever the algorithm; none untrained."""
    tests = [test for test in results["comparisons"] if (test["suite"], test["split"]) == (suite, split)]
    if not tests:
        return {}
    before, after = (success[f"success/{tests[0][side]}"] for side in ("before", "after"))
    change = round(tests[0]["change"], 6)  # 0.18, not 0.18000000000000005
    return {"before": before, "after": after, "change": change, "mcnemar_p": tests[0]["mcnemar_p"]}


def _log_suite(client: MlflowClient, parent: str, suite: str, results: dict[str, Any]) -> None:
    """The nested run of one suite's evaluation; it is found by the tags of its experiment's run, too."""
    split = _judged_split(results)
    metrics: dict[str, float] = {}
    for row in results["rows"]:
        if row["suite"] == suite:
            name = row["policy"] if row["split"] == split else f"{row['policy']}/{row['split']}"
            metrics |= {f"success/{name}": row["k"] / row["n"], f"episodes/{name}": row["n"]}
            metrics |= {f"low/{name}": row["wilson"][0], f"high/{name}": row["wilson"][1]}
    metrics |= _comparison(results, suite, split, metrics)
    run = client.get_run(parent)
    mine = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent}' and attributes.run_name = '{suite}'"
    found = client.search_runs([run.info.experiment_id], mine, max_results=1)
    child = found[0] if found else client.create_run(run.info.experiment_id, run_name=suite)
    tags = {name: value for name, value in run.data.tags.items() if name.startswith("pi0rl.")}
    tags |= {MLFLOW_PARENT_RUN_ID: parent, "pi0rl.kind": "evaluation", "pi0rl.suites": suite}
    client.log_batch(
        child.info.run_id, metrics=_metrics(metrics), tags=[RunTag(name, value) for name, value in tags.items()]
    )
    client.set_terminated(child.info.run_id, "FINISHED")


def _register(client: MlflowClient, run_id: str, results: dict[str, Any], hashes: dict[str, str]) -> None:
    """A version of the registered model: its weights are in DVC's cache, under the hash it records."""
    name = "-".join([*dict.fromkeys(row["suite"] for row in results["rows"]), results["protocol"]])
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    if client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        return
    card = {"dvc": hashes, "restore": f"pi0rl checkpoint restore {run_id}"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "checkpoint.json").write_text(json.dumps(card, indent=1))
        client.log_artifact(run_id, str(Path(folder) / "checkpoint.json"), CHECKPOINT)
    columns = _columns(results)
    success = columns.get("after", 0.0)
    tags = {f"dvc.{stage}": digest for stage, digest in hashes.items()} | {"success": repr(success)}
    version = client.create_model_version(name, f"runs:/{run_id}/{CHECKPOINT}", run_id, tags=tags)
    client.set_registered_model_alias(name, "candidate", version.version)
    if is_champion(success, columns, _champion_success(client, name)):
        client.set_registered_model_alias(name, "champion", version.version)


def is_champion(success: float, columns: dict[str, float], reigning: float | None) -> bool:
    """The rule: better than its own start with p below 0.05 on paired episodes, and above the reigning champion."""
    proven = columns.get("change", 0.0) > 0 and columns.get("mcnemar_p", 1.0) < ALPHA
    return proven and (reigning is None or success > reigning)


def _champion_success(client: MlflowClient, name: str) -> float | None:
    try:
        return float(client.get_model_version_by_alias(name, "champion").tags["success"])
    except MlflowException as error:
        if error.error_code in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):
            return None
        raise


def _metrics(values: dict[str, float]) -> list[Metric]:
    now = int(time.time() * 1000)
    return [Metric(name, float(value), now, 0) for name, value in values.items()]
