"""Where the other ranks are: asked when a wait for them fails, so that the error can say who is missing, and why."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

import pm
from adaloader.ranks.activity import describe_main_thread
from pm.messages import Kind, Message

_ANSWER_SECONDS = 1.0
_LOOK_SECONDS = 0.01
_MOST_DESCRIBED = 16
# What a rank sent before it closed may still be on its way.
_GRACE_SECONDS = 1.0


class Whereabouts:
    """Tells other ranks, when they ask, how far this one is, and asks them.

    Answers come from the background threads, so a rank whose own code is stuck answers too.

    Args:
        manager: of several ranks.
        sums_begun: returns how many sums of dense gradients this rank has begun.
    """

    def __init__(self, manager: pm.SynchronousManager, sums_begun: Callable[[], int]):
        self._manager = manager
        self._sums_begun = sums_begun
        self._answers: dict[int, tuple[int, int]] = {}
        self._doing: dict[int, str] = {}
        self._closed_since: float | None = None
        self._passed_on = manager.on_control
        manager.on_control = self._receive

    def describe(self) -> str:
        """Return a sentence on each rank that is behind this one, has closed, or does not answer within a second.

        Not for the background thread, on which the answers come.
        """
        manager = self._manager
        self._answers.clear()
        for peer in manager.peers:
            manager.transport.send(peer, Message(Kind.WHERE))
        manager.transport.wake()
        deadline = time.monotonic() + _ANSWER_SECONDS
        while time.monotonic() < deadline and not set(manager.peers) <= set(self._answers) | manager.closed_peers:
            time.sleep(_LOOK_SECONDS)
        found = [self._describe(peer) for peer in manager.peers]
        said = [text for text in found if text] or ["All ranks have begun as many sums as this one."]
        doing = [f"Rank {peer} is {self._doing[peer]}." for peer in manager.peers if peer in self._answers]
        return " ".join(said + doing[:_MOST_DESCRIBED])

    def why_in_vain(self) -> str | None:
        """Return why ranks cannot come to a sum any more, None where they can; raise a background failure."""
        self._manager.raise_failure()
        closed = self._manager.closed_peers
        if not closed:
            return None
        now = time.monotonic()
        self._closed_since = self._closed_since or now
        if now - self._closed_since < _GRACE_SECONDS:
            return None
        return f"rank {', '.join(map(str, sorted(closed)))} has closed its loader or ended"

    def _describe(self, peer: int) -> str:
        if peer in self._manager.closed_peers:
            return f"Rank {peer} has closed its loader or ended."
        if peer not in self._answers:
            steps, seconds = self._manager.others.ready[peer], self._manager.seconds_since(peer)
            return (
                f"Rank {peer} does not answer: its process is stopped, or its machine cannot be reached. It was last "
                f"heard of {seconds:.0f} s ago, and had applied {steps} optimizer steps.{self._who(peer)}"
            )
        steps, sums = self._answers[peer]
        mine = self._manager.steps, self._sums_begun()
        if (steps, sums) >= mine:
            return ""
        return (
            f"Rank {self._manager.rank} waits for rank {peer}, which has taken {steps} optimizer steps and begun "
            f"{sums} sums of gradients; this rank {mine[0]} and {mine[1]}.{self._who(peer)}"
        )

    def _who(self, peer: int) -> str:
        """Return a sentence on which process a rank is, where that is known."""
        return f" Rank {peer} is on {self._manager.who[peer]}." if self._manager.who else ""

    def _receive(self, source: int, message: Message) -> None:
        if message.kind == Kind.WHERE:
            numbers = (self._manager.steps, self._sums_begun())
            doing = np.frombuffer(describe_main_thread().encode(), np.uint8)
            self._manager.transport.send(source, Message(Kind.HERE, numbers, (doing,)))
        elif message.kind == Kind.HERE:
            self._doing[source] = message.arrays[0].tobytes().decode()
            self._answers[source] = message.numbers
        elif self._passed_on is not None:
            self._passed_on(source, message)
