"""Where the trainer's thread waits for what the background thread brings, and how it learns that it waits in vain."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class PeerError(RuntimeError):
    """Another rank closed, fell silent, or does not do what this rank does."""


class Waiting:
    """Lets threads wait for conditions that messages make true.

    Invariant: whoever waits looks at its condition again after every `notify`; a failure wakes all of them and stays.

    Args:
        rank: this rank, for messages.
        timeout_seconds: how long to wait at most.
        on_waited: called with the seconds of every wait.
    """

    def __init__(self, rank: int, timeout_seconds: float, on_waited: Callable[[float], None]):
        self.rank = rank
        self.timeout_seconds = timeout_seconds
        self.failure: BaseException | None = None
        self.failure_was_raised = False
        self.waiters = 0
        self.who = ""
        self.describe_peers: Callable[[], str] = str
        """Called, without a lock, for a sentence on the other ranks when one of them does not come."""
        self._on_waited = on_waited
        self._changed = threading.Condition()

    def until(
        self,
        reached: Callable[[], bool],
        describe: Callable[[], str],
        in_vain: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Block until `reached()`.

        Args:
            reached: the condition; it may become true on any thread that calls `notify` then.
            describe: says for what and whom, where the time limit passes.
            in_vain: returns why the condition can no longer become true, None where it can.

        Raises:
            PeerError: when the time limit passes, or `in_vain()` gives a reason while the condition does not hold.
        """
        self.raise_failure()
        if reached():
            return
        started = time.perf_counter()
        self.waiters += 1
        try:
            with self._changed:
                while not reached():
                    self.raise_failure()
                    reason = in_vain()
                    if reason is not None and not reached():  # the reason may have come after what was waited for
                        raise PeerError(f"rank {self.rank} {reason}")
                    if time.perf_counter() - started > self.timeout_seconds:
                        break
                    self._changed.wait(0.1)
            if not reached():
                self._waited_too_long(time.perf_counter() - started, describe)
        finally:
            self.waiters -= 1
            self._on_waited(time.perf_counter() - started)

    def _waited_too_long(self, waited: float, describe: Callable[[], str]) -> None:
        """Raise PeerError; in no lock, for the other ranks are asked what they are doing."""
        peers = self.describe_peers()
        raise PeerError(
            f"rank {self.rank} waited {waited:.0f} s (timeout_seconds={self.timeout_seconds:g}) for {describe()}"
            + (f" ({self.who})" if self.who else "")
            + (f". {peers}" if peers else "")
        )

    def raise_failure(self) -> None:
        """Raise what ended the background thread, if something did."""
        if self.failure is not None:
            self.failure_was_raised = True
            raise self.failure

    def notify(self) -> None:
        """Something that somebody may wait for has changed. Cheap where nobody waits."""
        if self.waiters:
            with self._changed:
                self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        self.failure = error
        with self._changed:
            self._changed.notify_all()
