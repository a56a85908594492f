"""``make serve``: Prefect's server, our work pool and deployments, and a worker, on loopback, until Ctrl-C."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

from prefect.settings import get_current_settings

from flows.prefect_plugin import API_URL
from flows.program import exit_code
from pi0rl.errors import UserError
from pi0rl.experiment import project_root
from pi0rl.processes import run_child, start_child, stop_descendants

POOL = "pi0rl"
BIN = Path(sys.executable).parent
START_SECONDS = 300.0  # 11 s on two idle cores the first time, minutes on busy ones


def serve(root: Path) -> None:
    """Start everything and watch it; raises UserError when a part does not start or ends."""
    api = get_current_settings().api.url or API_URL
    host, port = urlsplit(api).hostname or "127.0.0.1", urlsplit(api).port or 4200
    if _listens(host, port):
        raise UserError(f"port {port} is taken: another `make serve` may be running; stop it, or set PREFECT_API_URL")
    environment = {
        "PREFECT_API_URL": api,
        "PREFECT_HOME": str(root / ".prefect"),
        "PREFECT_PLUGINS_ENABLED": "false",  # ours is about the command line
        "PREFECT_LOGGING_LEVEL": "WARNING",
        "DO_NOT_TRACK": "1",
        "PWD": str(root),  # prefect.yaml names the folder by it, and a `make -C` or an editor leaves another one there
    }
    environment["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    server = start_child([_prefect(), "server", "start", "--host", host, "--port", str(port)], root, environment)
    _await(api, server)
    for arguments in (
        ("work-pool", "create", POOL, "--type", "process", "--overwrite"),
        ("--no-prompt", "deploy", "--all"),
    ):
        if code := run_child([_prefect(), *arguments], root, environment, on_line=_quiet, send=os.killpg):
            raise UserError(f"prefect {' '.join(arguments)}: exit code {code}; what it said is above")
    worker = start_child([_prefect(), "worker", "start", "--pool", POOL], root, environment)
    print(f"ready: {api.removesuffix('/api')}", flush=True)
    print(
        "  prefect deployment run libero-sweep/quickstart     (in another terminal; Ctrl-C here stops everything)",
        flush=True,
    )
    while True:
        for name, process in (("server", server), ("worker", worker)):
            if process.poll() is not None:
                raise UserError(f"Prefect's {name} ended with exit code {process.returncode}; what it said is above")
        time.sleep(1.0)


def _prefect() -> str:
    return str(BIN / "prefect")


def _quiet(line: str) -> None:
    """Prefect's own words on setting up, only where something is wrong."""
    if "rror" in line:
        print(line, file=sys.stderr)


def _listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def _await(api: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until the server answers."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise UserError(f"Prefect's server ended with exit code {server.returncode}; what it said is above")
        try:
            with urlopen(f"{api}/health", timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.5)
    raise UserError(f"Prefect's server did not answer at {api} within {START_SECONDS:.0f} s")


def main() -> int:
    """``python -m flows.serve``."""
    try:
        return exit_code(lambda: serve(project_root()))
    finally:
        stop_descendants()


if __name__ == "__main__":
    sys.exit(main())
