"""When the background thread lets a node go on: after messages at once, with rounds as often as they are allowed."""

from __future__ import annotations

import time

from pm.asynchronous.node import Node

_LONGEST_SECONDS_WITHOUT_ROUND = 0.01


class Pace:
    """Lets a node take its turns. Its caller holds the lock around the node, but for `is_turn`.

    A round waits for a worker's clock to advance, so that it carries a whole step's business, but not for long, and not
    where somebody waits for it and something has happened since the last: ranks that wait for each other must not keep
    from the processor the one that they wait for.

    Args:
        node: the node.
        max_rounds_per_second: how often it begins a round, at most.
    """

    def __init__(self, node: Node, max_rounds_per_second: float):
        self._node = node
        self._round_seconds = 1.0 / max_rounds_per_second
        self._next_round = 0.0
        self._clock_at_round = -1
        self._events_at_round = -1
        self._has_received = False

    def received(self) -> None:
        """The node has been handed a message."""
        self._has_received = True

    def is_turn(self) -> bool:
        """Whether there may be something to do."""
        return self._has_received or time.perf_counter() >= self._next_round

    def take_turn(self, *, ends: bool = False) -> bool:
        """Have the node do what is due, but begin no round if it `ends`; return whether it did anything."""
        now = time.perf_counter()
        busy, self._has_received = self._has_received, False
        if busy:
            self._node.after_messages()
        self._node.tell_time(now)
        if not ends and now >= self._next_round and self._is_worth_a_round(now):
            self._clock_at_round, self._events_at_round = self._node.claims.fastest, self._node.events
            self._node.round()
            self._next_round = now + self._round_seconds
            busy = True
        return busy

    def _is_worth_a_round(self, now: float) -> bool:
        node = self._node
        due = node.claims.fastest != self._clock_at_round or now >= self._next_round + _LONGEST_SECONDS_WITHOUT_ROUND
        due = due or (node.events != self._events_at_round and node.is_waited_for)
        return due and node.needs_round  # in this order: looking for work costs the most, and is asked often
