"""Print the table of results in docs/algorithm.md: ``python scripts/results_table.py``."""

from __future__ import annotations

import json
from pathlib import Path

from pi0rl.report.tables import SuiteResult, p_value, suite_cell

REPORTS = Path(__file__).parents[1] / "reports"
COMMANDS = {
    "quickstart": "`pi0rl run quickstart`",
    "seed1": "`pi0rl run quickstart --set seed=1 --output runs/seed1`",
    "seed2": "`pi0rl run quickstart --set seed=2 --output runs/seed2`",
}


def sweep_points() -> dict[str, str]:
    """Report -> the command that made it and which point it is, for every point of a sweep that has a report."""
    found = (path.parent.relative_to(REPORTS) for path in sorted(REPORTS.glob("sweeps/*/*/results.json")))
    return {str(each): f"`pi0rl sweep {each.parts[1]}`, {each.parts[2]}" for each in found}


def row(name: str, command: str) -> str:
    """One report: success before and after, what changed, and the command that made it."""
    results = json.loads((REPORTS / name / "results.json").read_text())
    rows = [SuiteResult(**entry) for entry in results["rows"]]
    before, after = (next(each for each in rows if (each.policy == "sft") is sft) for sft in (True, False))
    cells = [command, after.suite, suite_cell(before), suite_cell(after)]
    cells += [str(results["gained"]), str(results["lost"]), p_value(results["mcnemar_p"])]
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """The whole table in Markdown."""
    head = ["| command | suite | SFT | trained | gained | lost | McNemar p |", "|---|---|---|---|---|---|---|"]
    return "\n".join([*head, *(row(*item) for item in (COMMANDS | sweep_points()).items())])


if __name__ == "__main__":
    print(table())
