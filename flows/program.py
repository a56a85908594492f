"""What the modules that run as programs have in common: an error is one line, a signal an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable

from pi0rl.errors import UserError
from pi0rl.processes import Interrupted, raise_on_signals

# Begins the line that says why a program ended; flows.experiment looks for it in what stages print
ERROR = "pi0rl: error: "


def exit_code(program: Callable[[], None]) -> int:
    """Run ``program``; 0, or 2 after printing a UserError as one line, or 128 + the signal that stopped it."""
    raise_on_signals()
    try:
        program()
    except UserError as error:
        print(f"{ERROR}{error}", file=sys.stderr)
        return 2
    except Interrupted as interruption:
        return 128 + interruption.signum
    return 0
