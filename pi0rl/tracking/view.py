"""The list of runs in MLflow's pages as the comparison: one row per experiment, the best first.

MLflow keeps a view that somebody shares as a tag of the experiment; its address ends in ``?viewStateShareKey=NAME``.
"""

from __future__ import annotations

import json

VIEW = "comparison"

# Every key that MLflow's own shared views have: it takes them as they are
_STATE = {
    "searchFilter": "tags.`pi0rl.kind` = 'experiment'",
    "orderByKey": "metrics.`after`",
    "orderByAsc": False,
    "startTime": "ALL",
    "lifecycleFilter": "Active",
    "datasetsFilter": [],
    "modelVersionFilter": "All Runs",
    "selectedColumns": [
        *(f"metrics.`{name}`" for name in ("before", "after", "change", "mcnemar_p")),
        *(f"tags.`pi0rl.{name}`" for name in ("suites", "algorithm", "seed")),
    ],
    "runsExpanded": {},
    "runsPinned": [],
    "runsHidden": [],
    "runsHiddenMode": "FIRST_10_RUNS",
    "runsVisibilityMap": {},
    "viewMaximized": True,
    "runListHidden": False,
    "isAccordionReordered": False,
    "groupBy": None,
    "useGroupedValuesInCharts": True,
    "hideEmptyCharts": True,
    "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    "autoRefreshEnabled": False,
}

VIEW_TAGS = {
    f"mlflow.sharedViewState.{VIEW}": json.dumps(_STATE),
    "mlflow.experimentKind": "custom_model_development",  # else the pages are about chats
}
