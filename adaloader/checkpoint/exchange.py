"""What ranks tell each other of a checkpoint that they write in the background: when each is done, and how it ended.

All hear when a rank is done, so that whoever has waited too long can say for whom; what it has written, rank 0 hears.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from adaloader.errors import CheckpointError
from pm.messages import Kind, Message

if TYPE_CHECKING:
    import pm

_LOOK_SECONDS = 0.2


class Exchange:
    """Brings what each rank says of a save to rank 0, and what rank 0 makes of it to all.

    Made on every rank before a collective operation that comes before the first save, so that none is told of a save
    before it listens. Saves have the same numbers on all ranks.
    """

    def __init__(self, manager: pm.SynchronousManager):
        self._manager = manager
        self._changed = threading.Condition()
        self._said: dict[int, dict[int, str]] = defaultdict(dict)
        self._ended = 0
        self._on_ended: dict[int, Callable[[str], None]] = {}
        self._passed_on = manager.on_control
        manager.on_control = self._receive

    def begin(self, number: int, on_ended: Callable[[str], None]) -> None:
        """Save `number` begins; have `on_ended` called with what rank 0 says of its end. Before anything is written."""
        self._on_ended[number] = on_ended

    def say(self, number: int, text: str) -> None:
        """Tell rank 0 what has become of this rank's part, and the others that it is done. Any thread."""
        for rank in range(self._manager.ranks):
            self._send(rank, Kind.CHECKPOINT_WRITTEN, number, text if rank == 0 else "")

    def silent(self, number: int) -> list[int]:
        """Return the ranks that have not said yet what has become of their parts."""
        with self._changed:
            said = set() if number not in self._said else set(self._said[number])
        return [rank for rank in range(self._manager.ranks) if rank not in said]

    def hear(self, number: int) -> list[str]:
        """Return what all ranks have said, in their order; on rank 0, on a thread of its own.

        Raises:
            CheckpointError: if one cannot say anything any more.
        """
        ranks = range(self._manager.ranks)
        with self._changed:
            while len(self._said[number]) < len(ranks):
                self._changed.wait(_LOOK_SECONDS)
                silent = self._manager.gone_peers.difference(self._said[number])
                if silent or not self._manager.transport.alive:
                    raise CheckpointError(f"rank {', '.join(map(str, sorted(silent)))} ended while it was written")
            said = dict(self._said[number])
        return [said[rank] for rank in ranks]

    def end(self, number: int, text: str) -> None:
        """Tell all how a save ended; on rank 0, any thread."""
        for rank in range(self._manager.ranks):
            self._send(rank, Kind.CHECKPOINT_ENDED, number, text)

    def _send(self, rank: int, kind: Kind, number: int, text: str) -> None:
        message = Message(kind, (number,), (np.frombuffer(text.encode(), np.uint8),))
        if rank == self._manager.rank:
            self._receive(rank, message)
        else:
            self._manager.transport.send(rank, message)
            self._manager.transport.wake()

    def _receive(self, source: int, message: Message) -> None:
        if message.kind == Kind.CHECKPOINT_WRITTEN:
            with self._changed:
                if message.numbers[0] > self._ended:  # else rank 0 was faster to say how it ended
                    self._said[message.numbers[0]][source] = message.arrays[0].tobytes().decode()
                self._changed.notify_all()
        elif message.kind == Kind.CHECKPOINT_ENDED:
            number = message.numbers[0]
            with self._changed:
                self._ended = number
                self._said.pop(number, None)
            self._on_ended.pop(number)(message.arrays[0].tobytes().decode())
        elif self._passed_on is not None:
            self._passed_on(source, message)
