"""The templates of all pages, and how numbers, names and pictures are written in them."""

from __future__ import annotations

import base64
import json
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from pi0rl.report import plots
from pi0rl.report.costs import duration
from pi0rl.report.tables import POLICY_LABELS, SPLIT_LABELS, counted, interval, p_value, percent, points, suite_label
from pi0rl.report.videos import last_picture


@cache
def environment() -> Environment:
    """Jinja's environment; HTML is escaped, Markdown is not, and a name that is not there is an error."""
    made = Environment(
        loader=PackageLoader("pi0rl", "report"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {
        "percent": percent,
        "interval": interval,
        "points": points,
        "p_value": p_value,
        "duration": duration,
        "policy": lambda name: POLICY_LABELS.get(name, name),
        "suite": suite_label,
        "split": lambda name: SPLIT_LABELS.get(name, name),
        "plain": lambda value: "–" if value is None else json.dumps(value).strip('"'),
        "inline": plots.inline,
        "counted": counted,
        "data_uri": _data_uri,
        "poster": _poster,
    }
    return made


def _data_uri(video: Path) -> str:
    return f"data:video/mp4;base64,{base64.b64encode(video.read_bytes()).decode()}"


def _poster(video: Path) -> str:
    """How the episode ended, to be seen before the video is played."""
    return f"data:image/jpeg;base64,{base64.b64encode(last_picture(video)).decode()}"
