"""Print the table of results in docs/algorithm.md: ``python scripts/results_table.py``."""

from __future__ import annotations

import json
from pathlib import Path

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
    before, after = (next(r for r in results["rows"] if (r["policy"] == "sft") is sft) for sft in (True, False))
    shares = [f"{entry['k'] / entry['n']:.0%} ({entry['k']}/{entry['n']})" for entry in (before, after)]
    gained, lost, p = results["gained"], results["lost"], results["mcnemar_p"]
    return f"| {command} | {after['suite']} | {shares[0]} | {shares[1]} | {gained} | {lost} | {p:.1e} |"


def table() -> str:
    """The whole table in Markdown."""
    head = ["| command | suite | SFT | trained | gained | lost | McNemar p |", "|---|---|---|---|---|---|---|"]
    return "\n".join([*head, *(row(*item) for item in (COMMANDS | sweep_points()).items())])


if __name__ == "__main__":
    print(table())
