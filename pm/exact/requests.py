"""Requests for rows that may have moved: what is here is answered, the rest goes on to where it is believed to be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

import cuda_ops
from pm.exact.asked import Request
from pm.messages import Kind, Message, narrow, widen
from pm.rank_index import NOBODY
from pm.tables import Table

if TYPE_CHECKING:
    from pm.exact.synchronous import SynchronousManager


class Requests:
    """Takes requests in, from their askers and from ranks that send them on. On the background thread alone.

    A request goes from rank to rank, each of which keeps what it owns and sends on the rest: to the rank that it gave a
    row to, else to the row's home, which knows of every move sooner or later. So no request is lost, and each is
    answered once. One that comes from a row's home before the record does is kept until the record is here.

    Args:
        manager: whose rows these are.
    """

    def __init__(self, manager: SynchronousManager):
        self._manager = manager
        self._kept: list[tuple[int, Request]] = []

    def on_asked(self, source: int, message: Message) -> None:
        """INTENT, PULL, PULL_STATES or LOCATE(number, table, version, first ticket; rows): `source` asks for rows."""
        number, table_number, version, first = message.numbers
        rows = widen(message.arrays[0])
        tickets = np.arange(first, first + len(rows), dtype=np.int64)
        table = self._manager.tables[table_number]
        request = Request(message.kind, source, number, table, version, tickets, rows)
        self._take(source, request, forwarded=False)

    def on_forward(self, source: int, message: Message) -> None:
        """FORWARD(what, asker, number, table, version; tickets, rows): `source` does not have these rows."""
        what, asker, number, table_number, version = message.numbers
        tickets, rows = (widen(array) for array in message.arrays)
        table = self._manager.tables[table_number]
        request = Request(Kind(what), asker, number, table, version, tickets, rows)
        self._take(source, request, forwarded=True)

    def retry(self) -> None:
        """Records have come: look again at the requests that were kept for some."""
        kept, self._kept = self._kept, []
        for source, request in kept:
            self._take(source, request, forwarded=True)

    def take_again(self, request: Request) -> None:
        """Take in a request that was put aside; what its sender knew then counts no more."""
        self._take(NOBODY, request, forwarded=True)

    def ended(self, asker: int) -> None:
        """`asker` has closed."""
        self._kept = [(source, request) for source, request in self._kept if request.asker != asker]

    def _take(self, source: int, request: Request, *, forwarded: bool) -> None:
        manager, serving = self._manager, self._manager.serving
        if not forwarded or not serving.is_over(request):
            slots = manager.slots_here(request.table, request.rows)
            absent = np.flatnonzero(slots < 0)
            if len(absent):
                self._send_on(source, request.part(absent), forwarded)
                here = np.flatnonzero(slots >= 0)
                request, slots = request.part(here), slots[here]
            if len(slots) or not forwarded:
                serving.answer(request, slots, forwarded)

    def _send_on(self, source: int, request: Request, forwarded: bool) -> None:
        manager = self._manager
        keys = request.table.keys(request.rows)
        with manager.structure:
            # What a rank asks for itself it may have addressed before it knew what it has sent us since.
            ranks = manager.directory.forward_to(keys, source if forwarded else NOBODY)
        kept = np.flatnonzero(ranks == NOBODY)
        if len(kept):
            self._kept.append((source, request.part(kept)))
        if request.what == Kind.INTENT and not forwarded:
            manager.transport.send(
                request.asker, Message(Kind.FORWARDED, (request.number,), (narrow(request.tickets),))
            )
        manager.traffic.hops += len(keys) - len(kept)
        going = np.flatnonzero(ranks != NOBODY)
        order, counts = cuda_ops.partition(ranks[going], manager.ranks)
        numbers = (int(request.what), request.asker, request.number, request.table.number, request.version)
        for peer, part in enumerate(np.split(going[order], np.cumsum(counts)[:-1])):
            if len(part):
                arrays = narrow(request.tickets[part]), narrow(request.rows[part])
                manager.transport.send(peer, Message(Kind.FORWARD, numbers, arrays))


def ask(
    manager: SynchronousManager, what: Kind, peer: int, number: int, table: Table, version: int, first: int, rows
) -> None:
    """Ask `peer` for `rows` (int64 `[n]`), whose tickets begin with `first`; see `Requests.on_asked`. Any thread."""
    manager.transport.send(peer, Message(what, (number, table.number, version, first), (narrow(rows),)))
