"""Waiting until changes are everywhere: `wait_sync`, barriers, and the bound on staleness.

A flush is over when every change that this rank's workers had made when it began has been taken in by its owner. Then
the others are told: SYNC asks each to send the copies' holders what it has, and to answer once they have taken it in;
CLOCK says that this rank's changes of earlier clocks are in, and once that is so of all ranks, each owner sends out
what it has and says REFRESHED, behind which (messages arrive in order) copies hold every change of those clocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

import cuda_ops
from pm.asynchronous.holdings import Copies, Copy
from pm.messages import Kind, Message

if TYPE_CHECKING:
    from pm.asynchronous.node import Node


@dataclass
class Flush:
    """Changes on their way to their owners, and what to do when all are there.

    Args:
        unsent: by group, slots of copies whose changes have not left.
        parcels: the last parcels sent to each rank when the flush began: what leaves in later ones has left since.
        pushes: numbers of operations that change keys elsewhere.
        then: called at the end.
        target: once all has left, by rank, the parcel that must have been taken in.
    """

    unsent: list[tuple[Copies, np.ndarray]]
    parcels: np.ndarray
    pushes: set[int]
    then: Callable[[], None]
    target: np.ndarray | None = None


class Syncing:
    """The flushes of this rank, and what others ask of it."""

    def __init__(self, node: Node):
        self._node = node
        self._flushes: list[Flush] = []
        self._tokens = 0
        self._asked: list[tuple[int, int]] = []
        self._owed: list[tuple[int, int, np.ndarray]] = []
        self._answers: dict[int, set[int]] = {}
        self._clock = 0
        self._clocks = np.zeros(node.ranks, np.int64)
        self._refreshed = np.zeros(node.ranks, np.int64)
        self._said = 0

    @property
    def is_flushing(self) -> bool:
        """Whether nothing may be held back."""
        return bool(self._flushes)

    @property
    def needs_exchange(self) -> bool:
        """Whether somebody waits for changes to be sent on."""
        return bool(self._flushes or self._asked) or self._clocks.min() > self._said

    @property
    def has_work(self) -> bool:
        return bool(self._flushes or self._asked or self._owed) or self._clocks.min() > self._said

    # Asked of this rank

    def begin(self) -> int:
        """Begin to make all changes of this rank so far visible everywhere; return a token for `is_over`."""
        self._tokens += 1
        token = self._tokens
        self._answers[token] = set()
        self._flush(lambda: self._ask(token))
        return token

    def is_over(self, token: int) -> bool:
        """Whether every copy everywhere holds what this rank had changed when the token was given out."""
        if len(self._answers.get(token, ())) < self._node.ranks:
            return token not in self._answers
        del self._answers[token]
        return True

    def clock_advanced(self, clock: int) -> None:
        """This rank's slowest worker has come to `clock` (with a bound on staleness)."""
        self._clock = clock
        self._flush(lambda: self._say_clock(clock))

    def may_go_on(self, clock: int) -> bool:
        """Whether copies hold all changes that workers at `clock` must see."""
        return self._node.staleness is None or self._refreshed.min() >= clock - self._node.staleness

    def ranks_behind(self, clock: int) -> list[int]:
        """Return the ranks for which a worker at `clock` waits: those whose clock is behind, else who owe a refresh."""
        wanted = clock - (self._node.staleness or 0)
        slow = np.flatnonzero(self._clocks < wanted).tolist()
        return slow or np.flatnonzero(self._refreshed < wanted).tolist()

    def _flush(self, then: Callable[[], None]) -> None:
        node = self._node
        node.events += 1
        self._flushes.append(Flush(self._unsent(), node.last_parcels(), node.operations.pushes_under_way, then))
        self.go_on()

    def _unsent(self) -> list[tuple[Copies, np.ndarray]]:
        """Return the slots of copies whose changes have not left."""
        unsent = []
        for holdings in self._node.holdings:
            if holdings.copies.changed:
                slots, _ = cuda_ops.dedup(np.concatenate(holdings.copies.changed))
                unsent.append((holdings.copies, slots))
        return unsent

    def go_on(self) -> None:
        """Look which flushes are over; they end in their order."""
        while self._flushes and self._is_in(self._flushes[0]):
            self._flushes.pop(0).then()

    def _is_in(self, flush: Flush) -> bool:
        node = self._node
        if flush.pushes:
            flush.pushes &= node.operations.pushes_under_way
            if flush.pushes:
                return False
            flush.unsent += self._unsent()  # what waited may have gone into copies
            flush.parcels = node.last_parcels()
        left = []
        for copies, slots in flush.unsent:
            waits = copies.dirty[slots] & (copies.states[slots] == Copy.ACTIVE)
            waits &= copies.parcels[slots] <= flush.parcels[copies.owners[slots]]
            if waits.any():
                left.append((copies, slots[waits]))
        flush.unsent = left
        if left:
            return False
        if flush.target is None:
            flush.target = node.last_parcels()
        reached = node.acknowledged >= flush.target
        reached[node.rank] = True
        return bool(reached.all())

    # Between ranks

    def _tell_all(self, message: Message) -> None:
        for peer in self._node.peers:
            self._node.emit(peer, message)
        self._node.handle(self._node.rank, message)

    def _ask(self, token: int) -> None:
        self._tell_all(Message(Kind.SYNC, (token,)))

    def on_sync(self, source: int, message: Message) -> None:
        """SYNC(token): the changes of `source` are with their owners; have them sent to all copies."""
        self._asked.append((source, message.numbers[0]))

    def on_synced(self, source: int, message: Message) -> None:
        """SYNCED(token): the holders of copies of what `source` owns have what it had at our SYNC."""
        self._answers[message.numbers[0]].add(source)

    def _say_clock(self, clock: int) -> None:
        self._tell_all(Message(Kind.CLOCK, (clock,)))

    def on_clock(self, source: int, message: Message) -> None:
        """CLOCK(clock): all that workers of `source` changed in earlier clocks is with the owners."""
        self._clocks[source] = max(self._clocks[source], message.numbers[0])

    def on_refreshed(self, source: int, message: Message) -> None:
        """REFRESHED(clock): copies of what `source` owns hold all changes of earlier clocks."""
        self._refreshed[source] = max(self._refreshed[source], message.numbers[0])

    def round_ends(self) -> None:
        """Copies' holders have been sent what there was: answer who has asked for that."""
        node = self._node
        if self._clocks.min() > self._said:
            self._said = int(self._clocks.min())
            self._tell_all(Message(Kind.REFRESHED, (self._said,)))
        target = node.last_parcels()
        self._owed += [(source, token, target) for source, token in self._asked]
        self._asked = []
        still = []
        for source, token, target in self._owed:
            reached = node.acknowledged >= target
            reached[node.rank] = True
            if not reached.all():
                still.append((source, token, target))
            elif source == node.rank:
                node.handle(source, Message(Kind.SYNCED, (token,)))
            else:
                node.emit(source, Message(Kind.SYNCED, (token,)))
        self._owed = still
        self.go_on()
