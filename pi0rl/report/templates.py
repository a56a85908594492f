"""The templates of all pages, and how numbers, names and pictures are written in them."""

from __future__ import annotations

import base64
import json
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from pi0rl.report import plots
from pi0rl.report.costs import duration
from pi0rl.report.tables import POLICY_LABELS, SPLIT_LABELS, counted, suite_label
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


def percent(rate: float) -> str:
    """0.834 -> '83.4 %'."""
    return f"{100 * rate:.1f} %"


def points(change: float) -> str:
    """0.28 -> '+28.0'; a true minus sign for a loss, and no sign for none."""
    return f"{100 * change:+.1f}".replace("-", "−") if change else "0"


def p_value(p: float) -> str:
    """0.0312 -> '0.031', 8.1e-7 -> '8.1e-07'."""
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"
