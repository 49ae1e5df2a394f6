"""The end of a pass over a loader, with staleness: from then on all ranks see the same, though none has stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pm.messages import Kind, Message

if TYPE_CHECKING:
    from pm.asynchronous.eventual import EventualManager

_SENT, _EVERYWHERE = range(2)


class Passes:
    """How many passes each rank has ended, and what follows once all have.

    First every rank's changes go to their owners. Once all ranks have said that theirs are there, owners apply what has
    gathered, on their background threads, send it out, and say that it is everywhere: that is what the next lookup of a
    rank waits for. Ranks that have closed are not waited for.
    """

    def __init__(self, manager: EventualManager, ranks: int):
        self._manager = manager
        self._ended = np.zeros((2, ranks), np.int64)  # by phase and rank
        self._begun = 0
        self._under_way: list[tuple[int, int]] = []  # (pass, token of the flush after it)

    def ended_here(self) -> None:
        """This rank has had all batches of a pass, and its changes are with their owners."""
        number = int(self._ended[_SENT, self._manager.rank]) + 1
        self._say(number, _SENT)
        self._ended[_SENT, self._manager.rank] = number  # at once: the next lookup waits

    def ranks_behind(self) -> list[int]:
        """Return the ranks of which changes of passes that this rank has ended may be missing here."""
        behind = np.flatnonzero(self._ended[_EVERYWHERE] < self._ended[_SENT, self._manager.rank]).tolist()
        return [p for p in behind if p not in self._manager.closed_peers] if behind else behind

    def _say(self, number: int, phase: int) -> None:
        manager = self._manager
        for peer in range(manager.ranks):
            manager.deliver(peer, Message(Kind.EPOCH, (number, phase)))
        manager.transport.wake()

    # On the background thread

    def on_epoch(self, source: int, message: Message) -> None:
        """EPOCH(number, phase): of passes up to this number, all that `source` changed is with the owners (phase 0), or
        all that is owned by `source` is everywhere (1)."""
        number, phase = message.numbers
        self._ended[phase, source] = number
        self.look()

    def look(self) -> None:
        """Begin what follows if all ranks have ended another pass."""
        manager = self._manager
        ended = min(int(self._ended[_SENT, p]) for p in range(manager.ranks) if p not in manager.closed_peers)
        if ended > self._begun:
            self._begun = ended
            manager.take_what_has_gathered()
            self._under_way.append((ended, manager.begin_flush()))

    def go_on(self) -> None:
        """Say which passes are over everywhere, as far as this rank's records are concerned."""
        while self._under_way and self._manager.flush_is_over(self._under_way[0][1]):
            self._say(self._under_way.pop(0)[0], _EVERYWHERE)
