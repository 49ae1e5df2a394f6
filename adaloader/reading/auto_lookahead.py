"""How many batches to read ahead, from how long the training loop waits for rows."""

from __future__ import annotations

import time
from collections.abc import Callable

FIRST = 4
LEAST, MOST = 2, 64
_WINDOW_BATCHES = 16
_TOO_LONG = 0.01
"""Share of the time spent waiting from which more batches are read ahead."""
_QUIET_WINDOWS = 8
"""After so many windows without a wait worth the name, one batch less will do."""


class AutoLookahead:
    """A number of batches that follows measured waiting: doubled when the loop waits, one less after a quiet while.

    What is read ahead never changes results, so ranks need not agree on it.

    Args:
        waited: returns the seconds that the loop has waited for rows so far.
        now: a clock, in seconds.
    """

    def __init__(self, waited: Callable[[], float], now: Callable[[], float] = time.perf_counter):
        self.batches = FIRST
        self._waited, self._now = waited, now
        self._seen = 0
        self._quiet = 0
        self._began = now(), waited()

    def __call__(self) -> int:
        """Return the number; called once a batch."""
        self._seen += 1
        if self._seen >= _WINDOW_BATCHES:
            self._look()
        return self.batches

    def _look(self) -> None:
        now, waited = self._now(), self._waited()
        share = (waited - self._began[1]) / max(1e-9, now - self._began[0])
        self._seen, self._began = 0, (now, waited)
        if share > _TOO_LONG:
            self.batches = min(MOST, 2 * self.batches)
            self._quiet = 0
            return
        self._quiet += 1
        if self._quiet >= _QUIET_WINDOWS:
            self.batches = max(LEAST, self.batches - 1)
            self._quiet = 0
