"""Messages in the order in which a synchronous manager may take them in: some wait for a step, and hold up others."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from pm.messages import Kind, Message

if TYPE_CHECKING:
    from pm.exact.synchronous import SynchronousManager

_AT_ONCE = frozenset({Kind.SUM, Kind.ROWS_TO_PASS_ON, Kind.PASSED_ON})
"""Messages that others wait for, and that need wait for nothing that their senders have sent before."""


class Inbox:
    """What has come for one rank. For the background thread.

    Invariant: what waits of a rank is what it has sent after a message that is early, and that message first.

    Args:
        manager: whose messages these are.
        handlers: called with (source, message), by kind; those of other kinds go to `manager.on_control`.
    """

    def __init__(self, manager: SynchronousManager, handlers: dict[Kind, Callable[[int, Message], None]]):
        self._manager = manager
        self._handlers = handlers
        self._heard = [time.monotonic()] * manager.ranks
        self._waiting: list[deque[Message]] = [deque() for _ in range(manager.ranks)]

    def receive(self, source: int, message: Message) -> None:
        """Handle a message; records of a later version, and what the same rank sent after them, wait for that."""
        self._heard[source] = time.monotonic()
        if message.kind in _AT_ONCE:
            self._handle(source, message)
            self.resume()
        elif self._waiting[source] or self._is_early(source, message):
            self._waiting[source].append(message)
        else:
            self._handle(source, message)

    def resume(self) -> None:
        """A step has been applied, or rows were passed on: handle what has waited."""
        for source, waiting in enumerate(self._waiting):
            while waiting and not self._is_early(source, waiting[0]):
                self._handle(source, waiting.popleft())

    def first_waiting(self) -> list[tuple[int, Message]]:
        """Return (source, message) of the early message of each rank that has one. Any thread."""
        first = []
        for source, waiting in enumerate(self._waiting):
            try:
                first.append((source, waiting[0]))
            except IndexError:  # there is none, or the background thread has just handled it
                continue
        return first

    def seconds_since(self, peer: int) -> float:
        """Return how long ago the last message of a rank came. Any thread."""
        return time.monotonic() - self._heard[peer]

    def _is_early(self, source: int, message: Message) -> bool:
        if message.kind == Kind.RECORDS:
            return message.numbers[2] > self._manager.applied
        return self._manager.common_rows.is_on_its_way(source, message)

    def _handle(self, source: int, message: Message) -> None:
        handler = self._handlers.get(message.kind)
        if handler is not None:
            handler(source, message)
        elif self._manager.on_control is not None:
            self._manager.on_control(source, message)
