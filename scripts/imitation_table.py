"""Print the table of imitated tiny policies in docs/demonstrations.md: ``python scripts/imitation_table.py``."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from pi0rl.evaluation.statistics import wilson_interval

REPORTS = Path(__file__).parents[1] / "reports"
COLUMNS = {
    "tiny": "few-shot",
    "tiny_full": "full",
    "tiny_full_permuted": "full, permuted instructions",
}


def score(folder: Path) -> str:
    """Success, counts and 95 % Wilson interval of an evaluation's folder; a dash where there is none."""
    if not folder.is_dir():
        return "–"
    success = pd.read_parquet(folder / "episodes.parquet")["success_once"]
    return share(int(success.sum()), len(success))


def share(k: int, n: int) -> str:
    low, high = wilson_interval(k, n)
    return f"{k / n:.1%} ({k}/{n}) [{low:.1%}, {high:.1%}]"


def quickstart() -> str:
    """The few-shot policy of libero_object is the one that the quickstart's RL starts from."""
    rows = json.loads((REPORTS / "quickstart" / "results.json").read_text())["rows"]
    entry = next(row for row in rows if row["policy"] == "sft")
    return share(entry["k"], entry["n"])


def table() -> str:
    """The whole table in Markdown."""
    lines = [f"| suite | {' | '.join(COLUMNS.values())} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for suite in ("libero_spatial", "libero_object", "libero_goal", "libero_10"):
        scores = {kind: score(REPORTS / "imitation" / f"{suite}_{kind}") for kind in COLUMNS}
        if suite == "libero_object":
            scores["tiny"] = quickstart()
        lines.append(f"| {suite} | {' | '.join(scores.values())} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
