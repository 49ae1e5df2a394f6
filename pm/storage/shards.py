"""Bringing a whole table to rank 0, chunk by chunk, so that ranks hold no more than a few chunks beside their rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from pm.messages import Kind, Message
from pm.tables import Table

if TYPE_CHECKING:
    from pm.exact.synchronous import SynchronousManager

Receive = Callable[[np.ndarray, np.ndarray, np.ndarray], None]

_CHUNK, _END, _TAKEN = range(3)
_CHUNKS_UNDER_WAY = 2


class Shards:
    """One table after the other on its way to rank 0.

    Invariant: a rank has at most `_CHUNKS_UNDER_WAY` chunks under way that rank 0 has not taken.
    """

    def __init__(self, manager: SynchronousManager):
        self._manager = manager
        self._receiver: Receive | None = None
        self._ended: set[int] = set()
        self._under_way = 0

    def gather(self, table: Table, receive: Receive | None) -> None:
        """See `Manager.gather_table` (collective)."""
        manager = self._manager
        self._receiver, self._ended, self._under_way = receive, set(), 0
        manager.barrier()  # rank 0 is ready to receive
        if manager.rank == 0:
            for rows, values, states in manager.held_rows(table):
                receive(rows, values, states)
            manager.wait_until(lambda: self._ended >= set(manager.peers), self._describe_missing)
            self._receiver = None
        else:
            for arrays in manager.held_rows(table):
                self._under_way += 1
                self._send(_CHUNK, arrays)
                manager.wait_until(lambda: self._under_way < _CHUNKS_UNDER_WAY, lambda: "rank 0 to take a table's rows")
            self._send(_END)
        manager.barrier()

    def _send(self, what: int, arrays: tuple[np.ndarray, ...] = ()) -> None:
        self._manager.transport.send(0, Message(Kind.SHARD, (what,), arrays))
        self._manager.transport.wake()

    def _describe_missing(self) -> str:
        missing = sorted(set(self._manager.peers) - self._ended)
        return f"rank {', '.join(map(str, missing))} to send its rows of a table"

    def on_shard(self, source: int, message: Message) -> None:
        """SHARD(what; rows, values, states): a chunk, the end of them, or (to its sender) that a chunk was taken."""
        what = message.numbers[0]
        if what == _CHUNK:
            self._receiver(*message.arrays)
            self._manager.transport.send(source, Message(Kind.SHARD, (_TAKEN,)))
        elif what == _END:
            self._ended.add(source)
        else:
            self._under_way -= 1
