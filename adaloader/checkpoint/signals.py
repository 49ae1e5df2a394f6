"""Signals that ask a run to end: noted when they come, acted on where the loop asks for its next batch.

If it asks for none any more, what the signal did before is done late: when the loader is closed, or at exit.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading

_ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Not print: the signal may have come in the midst of one.
_SAID = (
    b"adaloader: ending with a checkpoint where the loop asks for its next batch, or without one when the loader is "
    b"closed; Ctrl-C again ends at once\n"
)


class Signals:
    """Notes SIGTERM, SIGUSR1 and the first Ctrl-C; the second Ctrl-C does what it did before.

    Only the main thread of a process can have signals; elsewhere none is noted. Invariant: what is in `_waiting` has
    noted a signal that nobody has acted on.
    """

    def __init__(self):
        self.received: int | None = None
        self._was_interrupted = self._is_acted_on = self._is_closed = False
        self._before: dict[int, object] = {}
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in _ASKING}

    @property
    def name(self) -> str:
        """The signal's name."""
        return "a signal to another rank" if self.received is None else signal.Signals(self.received).name

    def acted_on(self) -> None:
        """The run ends because of a signal, or it is said why not: what else comes meanwhile asks for no more."""
        self._is_acted_on = True
        _waiting.discard(self)

    def close(self) -> None:
        """Have signals do what they did before; on another thread than the main one, from the next one on."""
        self._is_closed = True
        if threading.current_thread() is threading.main_thread():
            before, self._before = self._before, {}
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def hand_on(self) -> None:
        """After `close`: have a signal that nobody has acted on do what it did before."""
        is_ours = self in _waiting and os.getpid() == self._process
        if not is_ours or threading.current_thread() is not threading.main_thread():
            return
        _waiting.discard(self)
        print(f"adaloader: {self.name} came after the last batch, so no checkpoint was made for it", file=sys.stderr)
        _raise(self.received)

    def _receive(self, number: int, frame) -> None:
        if os.getpid() != self._process:  # a worker of the loader, which inherits handlers: it is ended at once
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if self._is_closed:
            self.close()
            signal.raise_signal(number)
            return
        if number == signal.SIGINT:
            if self._was_interrupted:
                self.acted_on()
                raise KeyboardInterrupt
            self._was_interrupted = True
            os.write(2, _SAID)
        self.received = number
        if not self._is_acted_on:
            _waiting.add(self)


_waiting: set[Signals] = set()


def name_of_waiting() -> str:
    """Return the name of a signal that nobody has acted on, an empty text if there is none."""
    return next((each.name for each in _waiting), "")


def end_by_waiting() -> None:
    """The process ends: have a signal that nobody has acted on end it, so that whoever started it sees so."""
    for each in list(_waiting):
        each.close()
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # an exception at exit would end nothing
        each.hand_on()


def _raise(number: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # of a stream that is closed, or none
            stream.flush()
    signal.raise_signal(number)
