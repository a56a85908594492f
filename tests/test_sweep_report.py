"""The comparison of a sweep: the published form over seeds, one section per protocol, charts and corrected p-values."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from browser import require_readable

from pi0rl.errors import UserError
from pi0rl.evaluation.statistics import bootstrap_mean
from pi0rl.report.published import published_table
from pi0rl.report.sweep import Finished, write_sweep_report


def results(policy: str, suite: str, before: Sequence[int], after: Sequence[int], protocol: str = "abc") -> dict:
    """The content of a results.json: successes of ten episodes per task."""
    k = {"sft": sum(before), policy: sum(after)}
    n = 10 * len(before)
    return {
        "protocol": protocol,
        "checkpoints_sha256": {"sft/policy/model.safetensors": f"{suite} {before}"},
        "rows": [
            {
                "policy": name,
                "split": "held_out",
                "suite": suite,
                "k": k[name],
                "n": n,
                "errors": 1,
                "wilson": [0.3, 0.6],
            }
            for name in k
        ],
        "comparisons": [
            {
                "before": "sft",
                "after": policy,
                "split": "held_out",
                "suite": suite,
                "change": (k[policy] - k["sft"]) / n,
                "gained": 9,
                "lost": 4,
                "n": n,
                "mcnemar_p": 0.02,
            }
        ],
        "tasks": [
            {"split": "held_out", "suite": suite, "counts": {"sft": [one, 10], policy: [two, 10]}}
            for one, two in zip(before, after, strict=True)
        ],
    }


SUITES_SWEEP = [
    ({"algorithm": algorithm, "suite": name, "seed": seed}, results(algorithm, suite, [4, 5 + seed], [8, 9 - lower]))
    for algorithm, lower in (("ppo", 0), ("grpo", 3))
    for name, suite in (("object", "libero_object"), ("spatial", "libero_spatial"))
    for seed in (0, 1)
]


def write(folder: Path, points: Sequence[tuple[dict[str, Any], dict]]) -> Path:
    finished = []
    for number, (coordinates, content) in enumerate(points):
        report = folder / f"point{number}"
        report.mkdir()
        (report / "results.json").write_text(json.dumps(content))
        finished.append(Finished(report.name, coordinates, report))
    return write_sweep_report("s", finished, folder / "report")


def test_runs_of_two_algorithms_on_two_suites_are_the_published_table() -> None:
    table = published_table(SUITES_SWEEP, "held_out")
    assert table.suites == ("libero_spatial", "libero_object")
    assert [(row.policy, row.setting, row.seeds) for row in table.rows] == [
        ("sft", "", 2),
        ("ppo", "", 2),
        ("grpo", "", 2),
    ]
    sft, ppo, grpo = table.rows
    counts = np.array([[[4, 10], [4, 10]], [[5, 10], [6, 10]]])  # tasks, seeds
    spatial = sft.cells["libero_spatial"]
    assert (spatial.k, spatial.n, spatial.errors, spatial.rate) == (19, 40, 2, pytest.approx(19 / 40))
    assert spatial.interval == bootstrap_mean({"libero_spatial": counts}, seed=0)
    assert ppo.mean is not None
    assert grpo.mean is not None
    assert (ppo.mean.rate, grpo.mean.rate) == (pytest.approx(0.85), pytest.approx(0.7))


def test_what_else_was_varied_is_a_row_of_its_own_and_a_missing_suite_an_empty_cell() -> None:
    points = [
        ({"lr": lr, "seed": 0}, results("ppo", "libero_object", [5, 5], [6, gained]))
        for lr, gained in ((1e-5, 6), (1e-4, 9))
    ]
    table = published_table(
        [*points, ({"lr": 1e-4, "seed": 0}, results("ppo", "libero_10", [1, 2], [3, 3]))], "held_out"
    )
    assert [(row.policy, row.setting) for row in table.rows] == [("sft", ""), ("ppo", "lr 1e-05"), ("ppo", "lr 0.0001")]
    assert table.rows[1].cells_of(table.suites)[1:] == [None, None]  # nor a mean beside one of other suites
    mean = table.rows[2].mean
    assert mean is not None
    assert mean.rate == pytest.approx((15 / 20 + 6 / 20) / 2)


def test_a_start_that_seeds_share_counts_once() -> None:
    points = [({"seed": seed}, results("ppo", "libero_goal", [4, 5], [8, 9 - seed])) for seed in (0, 1)]
    sft, ppo = published_table(points, "held_out").rows
    assert (sft.seeds, sft.cells["libero_goal"].n) == (1, 20)
    assert (ppo.seeds, ppo.cells["libero_goal"].n) == (2, 40)


def test_the_page_of_a_sweep_holds_every_point(tmp_path: Path) -> None:
    points = [
        ({"actor.optim.lr": 1e-4 * (1 + seed), "seed": seed}, results("ppo", "libero_object", [5, 5], after))
        for seed, after in enumerate([[8, 8], [4, 4]])
    ]
    target = write(tmp_path, points)
    table = pd.read_csv(target / "comparison.csv")
    assert table["after"].tolist() == [0.8, 0.4]
    assert table["p_holm"].tolist() == [0.04, 0.04]
    assert table["errors"].tolist() == [2, 2]
    page = (target / "index.html").read_text()
    assert "80.0 %" in page
    assert "actor.optim.lr: 0.0001 80 % (n = 1), 0.0002 40 % (n = 1)" in page
    assert page.count('<small class="worse">2 errors</small>') == 6
    assert page.count("<svg") == 2
    assert "#ffffff" not in page.partition("<svg")[2]  # no white paper in a dark page
    assert page.count('<span aria-label="worse">▼</span> −10.0') == 1
    text = (target / "report.md").read_text()
    assert (
        "| point0 | 0.0001 | 0 | Object | 50.0 % | 80.0 % [30.0 %, 60.0 %] | +30.0 | 9 | 4 | 2 | 0.020 | 0.040 |"
        in text
    )
    for name in ("effects.svg", "points.svg"):
        assert (target / name).is_file()
        assert f"]({name})" in text


def test_results_of_different_protocols_never_share_a_table(tmp_path: Path) -> None:
    points = [
        ({"chunk": chunk, "seed": seed}, results("ppo", "libero_object", [5, 5], [8, 8], protocol))
        for chunk, protocol in ((5, "abc"), (10, "def"))
        for seed in (0, 1)
    ]
    target = write(tmp_path, points)
    first, second = (target / "report.md").read_text().split("## Protocol ")[1:]
    assert first.startswith("abc, held-out init states")
    assert second.startswith("def, held-out init states")
    assert [f"| point{number} |" in first for number in range(4)] == [True, True, False, False]
    assert [f"| point{number} |" in second for number in range(4)] == [False, False, True, True]
    assert "PPO, 2 seeds" in first


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ("{", "point/results.json: not readable as JSON"),
        (json.dumps({"rows": [], "comparisons": [], "tasks": []}), "results.json: no 'protocol', expected rows, "),
        (
            json.dumps(results("ppo", "libero_object", [5], [8]) | {"checkpoints_sha256": {}}),
            "results.json: no digest of sft/policy/model.safetensors",
        ),
    ],
)
def test_a_damaged_or_older_report_is_one_line(damaged: str, message: str, tmp_path: Path) -> None:
    report = tmp_path / "point"
    report.mkdir()
    (report / "results.json").write_text(damaged)
    with pytest.raises(UserError, match=message):
        write_sweep_report("s", [Finished("point", {"seed": 0}, report)], tmp_path / "report")


def test_chromium_opens_the_page_without_a_complaint(tmp_path: Path) -> None:
    report = write(tmp_path, SUITES_SWEEP) / "index.html"
    for scheme in ("light", "dark"):
        require_readable(report, tmp_path, scheme)
    page = report.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page)
    assert all("aria-label=" in tag for tag in re.findall(r"<svg [^>]*>", page))
