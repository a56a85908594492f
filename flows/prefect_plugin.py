"""What the `prefect` command does in this project; Prefect loads it by the setting ``plugins.enabled``.

Prefect itself takes only FLOW/DEPLOYMENT, and with no server it schedules runs that never start. Here the command line
speaks to the server of ``make serve`` unless another is configured, a server that does not answer is one line, and the
bare name of one of our flows means its deployment ``quickstart``.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

from prefect.plugins import HookContext, SetupResult, register_hook

API_URL = "http://127.0.0.1:4200/api"
FLOWS = ("libero-experiment", "libero-sweep")
DEFAULT_DEPLOYMENT = "quickstart"


@register_hook
def setup_environment(*, ctx: HookContext) -> SetupResult | None:  # keyword-only, as Prefect specifies the hook
    """Name the server for the command line and complete a bare flow name; raises SystemExit where no server answers."""
    if Path(sys.argv[0]).name != "prefect":
        return None  # a flow brings its own server
    api_url = ctx.api_url or API_URL
    if sys.argv[1:3] == ["deployment", "run"]:
        sys.argv[3:] = [f"{word}/{DEFAULT_DEPLOYMENT}" if word in FLOWS else word for word in sys.argv[3:]]
        asks_for_help = "--help" in sys.argv or "-h" in sys.argv
        if not asks_for_help and not _answers(api_url):
            raise SystemExit(
                f"pi0rl: error: no Prefect server answers at {api_url}, so nothing would run; start one with "
                "`make serve` (in another terminal), or run here and now with `pi0rl sweep quickstart`"
            )
    return SetupResult(env={"PREFECT_API_URL": api_url, "DO_NOT_TRACK": "1"})


def _answers(api_url: str) -> bool:
    url = urlsplit(api_url)
    try:
        with socket.create_connection((url.hostname or "127.0.0.1", url.port or 80), timeout=5):
            return True
    except OSError:
        return False
