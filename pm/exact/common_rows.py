"""Rows that several ranks of another machine are to have copies of: sent to one of them, which passes them on.

Each rank hears from the owner, in its turn among all that the owner sends it, which rows these are (COMMON_ROWS); their
values come by way of the rank of its machine that deals with the owner. What comes from the owner later waits for them.
So everything is as if the owner had sent them itself. To pass values on a rank needs to know nothing, and does so at
once: nobody who waits for another is in the way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

import cuda_ops
from pm.messages import Kind, Message, narrow, widen
from pm.tables import Table

if TYPE_CHECKING:
    from pm.exact.synchronous import SynchronousManager

ALL_ROWS = np.empty(0, np.int32)
"""In place of tickets: every row of the plan that the sender owns."""
FIRST_ROWS = np.empty(0, np.int32)
"""In place of places among values that are passed on: those from the first on."""


@dataclass(frozen=True)
class Copies:
    """Rows of a plan of `peer` that it is to have copies of now.

    Args:
        peer: the rank.
        number: of its plan.
        table: of which.
        tickets: int64 `[n]`, ascending: what it calls them.
        slots: int64 `[n]`: where they are. They are pinned.
        whole: whether they are all that it has asked for of this owner, and still has to get there.
    """

    peer: int
    number: int
    table: Table
    tickets: np.ndarray
    slots: np.ndarray
    whole: bool


class CommonRows:
    """Sends rows to ranks of another machine, and takes in and passes on what others send so.

    On the background thread. Invariant: `_here` has what was passed on before the COMMON_ROWS that say what it is have
    had their turn, by owner and serial number.

    Args:
        manager: of which rank.
    """

    def __init__(self, manager: SynchronousManager):
        self._manager = manager
        self._serials = 0
        self._here: dict[tuple[int, int], np.ndarray] = {}
        self._needs_none = False

    # The owner

    def send_copies(self, copies: Sequence[Copies]) -> None:
        """Send rows to ranks of one machine: those that are in several of `copies` once."""
        by_table: dict[int, list[Copies]] = defaultdict(list)
        for each in copies:
            by_table[each.table.number].append(each)
        for some in by_table.values():
            if len(some) == 1:
                self.send_to_one(some[0])
            else:
                self._send_common(some)

    def send_to_one(self, copies: Copies, *, answer: bool = False) -> None:
        """ROWS(plan, whether it is an answer; tickets, values)."""
        tickets = ALL_ROWS if copies.whole else narrow(copies.tickets)
        arrays = tickets, self._values(copies.table, copies.slots)
        self._manager.transport.send(copies.peer, Message(Kind.ROWS, (copies.number, int(answer)), arrays))

    def _send_common(self, copies: list[Copies]) -> None:
        """ROWS_TO_PASS_ON(rank, serial number, rows, of each who gets some; values, and the places in them of each)."""
        slots, inverse, counts = cuda_ops.dedup_counts(np.concatenate([each.slots for each in copies]))
        is_common = counts > 1
        place_of = np.cumsum(is_common) - 1
        addresses: list[int] = []
        places: list[np.ndarray] = []
        ends = np.cumsum([len(each.slots) for each in copies])[:-1]
        for each, indices in zip(copies, np.split(inverse, ends), strict=True):
            common = is_common[indices]
            count = int(np.count_nonzero(common))
            if count < len(common):
                self.send_to_one(_part(each, ~common) if count else each)
            if count:
                addresses += [each.peer, self._serials, count]
                places.append(_as_places(place_of[indices[common]]))
                self._announce(_part(each, common) if count < len(common) else each)
        if addresses:
            manager = self._manager
            agent = manager.machines.agent(manager.machines.of(copies[0].peer), manager.rank)
            values = self._values(copies[0].table, slots[is_common])
            manager.transport.send(agent, Message(Kind.ROWS_TO_PASS_ON, tuple(addresses), (values, *places)))

    def _announce(self, copies: Copies) -> None:
        tickets = ALL_ROWS if copies.whole else narrow(copies.tickets)
        self._manager.transport.send(copies.peer, Message(Kind.COMMON_ROWS, (copies.number, self._serials), (tickets,)))
        self._serials += 1

    def _values(self, table: Table, slots: np.ndarray) -> np.ndarray:
        self._manager.catch_up(table, slots, states=False)
        return table.store.values(slots, np.empty((len(slots), table.spec.dim), table.spec.dtype))

    # The rank that deals with the owner

    def on_rows_to_pass_on(self, source: int, message: Message) -> None:
        """ROWS_TO_PASS_ON: see `_send_common`."""
        values, *places = message.arrays
        addresses = np.array(message.numbers, np.int64).reshape(-1, 3).tolist()
        for (peer, serial, count), at in zip(addresses, places, strict=True):
            part = values[widen(at)] if len(at) else values[:count]
            if peer == self._manager.rank:
                self._take_in(source, serial, part)
            else:
                self._manager.transport.send(peer, Message(Kind.PASSED_ON, (source, serial), (part,)))

    # The ranks that get the rows

    def on_passed_on(self, source: int, message: Message) -> None:
        """PASSED_ON(owner, serial number; values)."""
        owner, serial = message.numbers
        self._take_in(owner, serial, message.arrays[0])

    def _take_in(self, owner: int, serial: int, values: np.ndarray) -> None:
        if not self._needs_none:
            self._here[owner, serial] = values

    def wait_for_none(self) -> None:
        """This rank has closed: it reads no rows any more."""
        self._needs_none = True
        self._here.clear()

    def is_on_its_way(self, source: int, message: Message) -> bool:
        """Whether a message is COMMON_ROWS whose values have not been passed on yet."""
        if message.kind != Kind.COMMON_ROWS or self._needs_none:
            return False
        return (source, message.numbers[1]) not in self._here

    def on_common_rows(self, source: int, message: Message) -> None:
        """COMMON_ROWS(plan, serial number; tickets): as ROWS, whose values are here."""
        number, serial = message.numbers
        if not self._needs_none:
            arrays = message.arrays[0], self._here.pop((source, serial))
            self._manager.asking.on_rows(source, Message(Kind.ROWS, (number, 0), arrays))

    @property
    def under_way(self) -> int:
        """Number of rows' values that have come and had no turn yet."""
        return sum(map(len, self._here.values()))


def _part(copies: Copies, kept: np.ndarray) -> Copies:
    return Copies(copies.peer, copies.number, copies.table, copies.tickets[kept], copies.slots[kept], False)


def _as_places(places: np.ndarray) -> np.ndarray:
    in_turn = np.array_equal(places, np.arange(len(places)))
    return FIRST_ROWS if in_turn else narrow(places)
