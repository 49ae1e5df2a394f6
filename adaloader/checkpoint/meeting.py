"""Where ranks meet that come to the same place again and again, apart: at one that none of them has passed yet.

A rank that wants to meet asks. Every rank, on its background thread, says at which place it is, and all meet at the one
after the furthest. So a rank need wait for the others' words alone, which come whatever their loops are doing, until it
is at the place where all of them stop. (A rank that stopped where it is could be what another, which has gone past that
place, waits for.)
"""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from pm.messages import Kind, Message

if TYPE_CHECKING:
    from pm import SynchronousManager

_ASK, _SAY, _MEET = range(3)
_PLACES_OF_A_PASS = 1 << 40
FOLLOWING = -1


class Meeting:
    """Brings the ranks of a manager together; construction is collective.

    Places are numbered by pass and within it, alike on all ranks but for the end of a pass, which some may reach before
    others. Invariant: this rank has said, of each asking up to `_asked`, at which place it was, and passes the next one
    only when it knows what all have said.
    """

    def __init__(self, manager: SynchronousManager):
        self._manager = manager
        self._lock = threading.Lock()
        self._place = 0
        self._pass = 0
        self._asked = self._settled = 0
        self._said: dict[int, dict[int, int]] = defaultdict(dict)
        self._meetings = 0
        self._meetings_of_others = 0
        self._passed_on = manager.on_control
        manager.on_control = self._receive
        manager.barrier()  # nobody asks a rank that does not listen yet

    # On the background thread

    def _receive(self, source: int, message: Message) -> None:
        if message.kind != Kind.CHECKPOINT:
            if self._passed_on is not None:
                self._passed_on(source, message)
            return
        what, number, place = message.numbers
        if what == _MEET:
            self._meetings_of_others = max(self._meetings_of_others, number)
            return
        if what == _SAY:
            self._said[number][source] = place
        self._say(number)

    def _say(self, number: int) -> None:
        """Say where this rank is, if it has not in answer to asking `number`."""
        with self._lock:
            if number <= self._asked:
                return
            place, self._asked = self._place, number
        self._said[number][self._manager.rank] = place
        self._tell(_SAY, number, place)

    def _tell(self, what: int, number: int, place: int) -> None:
        for peer in self._manager.peers:
            self._manager.transport.send(peer, Message(Kind.CHECKPOINT, (what, number, place)))
        self._manager.transport.wake()

    # In the loop

    def pass_begins(self) -> None:
        self._pass += 1
        with self._lock:
            self._place = self._pass * _PLACES_OF_A_PASS

    def ask(self) -> None:
        """Have all ranks meet, soon; without effect while they are about to."""
        if self._asked == self._settled:
            self._say(self._asked + 1)

    def is_at_next_place(self) -> bool:
        """This rank has come to its next place: return whether it is that of a meeting."""
        with self._lock:
            self._place += 1
            asked = self._asked
        if asked == self._settled:
            return False
        number, ranks = self._settled + 1, self._manager.ranks
        said = self._said[number]
        self._manager.wait_until(
            lambda: len(said) == ranks,
            lambda: f"rank {', '.join(str(r) for r in range(ranks) if r not in said)} to say how far it is",
        )
        if self._place <= max(said.values()):
            return False
        del self._said[number]
        self._settled = number
        return True

    def meet(self, word: int, other: int) -> tuple[np.ndarray, np.ndarray]:
        """Wait until all ranks are here; return what each has given as `word` and `other` (collective)."""
        self._meetings += 1
        self._tell(_MEET, self._meetings, 0)
        mine, everyones = np.array([word, other], np.int64), np.empty((self._manager.ranks, 2), np.int64)
        self._manager.transport.collective(lambda comm: comm.Iallgather(mine, everyones), self._manager.timeout_seconds)
        return everyones[:, 0], everyones[:, 1]

    # What a rank does that has run out of batches, and follows the others

    @property
    def others_wait(self) -> bool:
        """Whether others have come to a meeting to which this rank has not."""
        return self._meetings_of_others > self._meetings

    def decline(self) -> None:
        """Tell the others, who wait, that this rank has left its loop (collective)."""
        self.meet(FOLLOWING, 0)
        if self._asked > self._settled:
            self._said.pop(self._settled + 1, None)
            self._settled += 1
