"""Progress with an estimate of the time left, as plain lines: readable in a terminal and in a log alike."""

from __future__ import annotations

import sys
import time

INTERVAL_SECONDS = 5.0


class Progress:
    """Counts towards ``total``; prints at most one line per INTERVAL_SECONDS, and the last one always."""

    def __init__(self, name: str, total: int, unit: str, done: int = 0) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._before = done
        self._started = self._printed = time.monotonic()

    def update(self, done: int, note: str = "", always: bool = False) -> None:
        """``done`` of ``total`` units are finished; ``always`` prints whenever the last line was."""
        now = time.monotonic()
        if not always and done < self._total and now - self._printed < INTERVAL_SECONDS:
            return
        self._printed = now
        elapsed, fresh = now - self._started, done - self._before
        left = f", {clock(elapsed / fresh * (self._total - done))} left" if fresh and done < self._total else ""
        text = f"{self._name}: {self._unit} {done}/{self._total}, {clock(elapsed)}{left}"
        print(f"{text}; {note}" if note else text, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """``75`` -> ``1:15``."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
