"""Print the table of imitated tiny policies in docs/demonstrations.md: ``python scripts/imitation_table.py``."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from pi0rl.report.tables import SuiteResult, suite_cell, summarise

REPORTS = Path(__file__).parents[1] / "reports"
COLUMNS = {
    "tiny": "few-shot",
    "tiny_full": "full",
    "tiny_full_permuted": "full, permuted instructions",
}


def evaluated(folder: Path) -> str:
    """What is in the folder of an evaluation; a dash where there is none."""
    if not folder.is_dir():
        return "–"
    (row,) = summarise(pd.read_parquet(folder / "episodes.parquet")).rows
    return suite_cell(row)


def quickstart() -> str:
    """The few-shot policy of libero_object is the one that the quickstart's RL starts from."""
    rows = json.loads((REPORTS / "quickstart" / "results.json").read_text())["rows"]
    return suite_cell(next(SuiteResult(**row) for row in rows if row["policy"] == "sft"))


def table() -> str:
    """The whole table in Markdown."""
    lines = [f"| suite | {' | '.join(COLUMNS.values())} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for suite in ("libero_spatial", "libero_object", "libero_goal", "libero_10"):
        scores = {kind: evaluated(REPORTS / "imitation" / f"{suite}_{kind}") for kind in COLUMNS}
        if suite == "libero_object":
            scores["tiny"] = quickstart()
        lines.append(f"| {suite} | {' | '.join(scores.values())} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
