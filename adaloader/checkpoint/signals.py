"""Signals that ask a run to end: noted when they come, acted on where the loop asks for its next batch."""

from __future__ import annotations

import os
import signal
import threading

_ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Signals:
    """Notes SIGTERM, SIGUSR1 and the first Ctrl-C; the second Ctrl-C does what it did before.

    Only the main thread of a process can have signals; elsewhere none is noted.
    """

    def __init__(self):
        self.received: int | None = None
        self._before: dict[int, object] = {}
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in _ASKING}

    @property
    def name(self) -> str:
        """The signal's name."""
        return "a signal to another rank" if self.received is None else signal.Signals(self.received).name

    def close(self) -> None:
        """Have signals do what they did before."""
        before, self._before = self._before, {}
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _receive(self, number: int, frame) -> None:
        if os.getpid() != self._process:  # a worker of the loader, which inherits handlers: it is ended at once
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if number == signal.SIGINT:
            if self.received == signal.SIGINT:
                raise KeyboardInterrupt
            # Not print: the signal may have come in the midst of one.
            os.write(2, b"adaloader: ending after this step, with a checkpoint; Ctrl-C again ends at once\n")
        self.received = number
