"""Records on their way from owner to owner."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

import cuda_ops
from pm.exact.asked import AskedPlan
from pm.exact.reuse import Reuse
from pm.messages import Kind, Message, narrow, widen
from pm.storage.store import RecordStore
from pm.tables import Table

if TYPE_CHECKING:
    from pm.exact.synchronous import SynchronousManager

ALL_TICKETS = np.empty(0, np.int32)
"""In place of tickets: every row of the plan that the sender serves."""


_FEW = 1 / 8
_SELDOM = 8
"""A part of a plan's rows that is less than `_FEW` moves every `_SELDOM` steps alone: to move few rows takes as long as
to move many, and is on somebody's critical path."""


class Moving:
    """Gives rows away and takes them in. On the background thread alone.

    A row may move to a rank that has it in a live plan, when no other rank has (see `SlotNotes`), nothing of a step
    under way is for it, and the rank has no copy of it that it may have made a gradient with. So whoever has a gradient
    for a row knows who owns it. Where a copy would do as well, it does move once that is likely to send fewer bytes
    than copies, by the uses that the rank intends, or by how ranks came back to such rows before (see `Reuse`). A
    record carries its version with it; a rank that is not so far takes it in when it is.

    Args:
        manager: whose rows these are.
    """

    def __init__(self, manager: SynchronousManager):
        self._manager = manager
        self._reuse: defaultdict[int, Reuse] = defaultdict(lambda: Reuse(manager.ranks, manager.rank))

    def uses_of(self, table: Table) -> np.ndarray:
        """Return what is seen of how ranks use the rows of `table` (see `Reuse.uses`)."""
        return self._reuse[table.number].uses

    # Out

    def give(self, peer: int, plan: AskedPlan, positions: np.ndarray) -> np.ndarray:
        """Give the rows at `positions` of a plan of `peer` to it, as far as they may move and should.

        Returns:
            positions: in what is left of the plan, those that stay.
        """
        with self._manager.structure:
            free = self._to_move(peer, plan, positions)
            if not free.any():
                return positions
            kept = np.ones(len(plan.slots), bool)
            kept[positions[free]] = False
            stays = np.zeros(len(plan.slots), bool)
            stays[positions[~free]] = True
            self._send(peer, plan, np.flatnonzero(~kept))
            plan.keep(kept)
        return np.flatnonzero(stays[kept])

    def _to_move(self, peer: int, plan: AskedPlan, positions: np.ndarray) -> np.ndarray:
        """Return which of the rows at `positions` of a plan of `peer` leave now (bool `[n]`)."""
        notes, slots = self._manager.serving.notes_of(plan.table.store), plan.slots[positions]
        if not self._manager.techniques.copies_ahead:
            return notes.only_held_by(slots, peer)
        needed, stages = self._reuse[plan.table.number].worth_a_move(peer, plan.table.store)
        moves = notes.worth_moving(slots, peer, needed, stages)
        many = np.count_nonzero(moves) >= _FEW * len(plan.slots)
        if not many and self._manager.applied % _SELDOM:
            moves[:] = False
        return moves

    def _send(self, peer: int, plan: AskedPlan, positions: np.ndarray) -> None:
        """RECORDS(plan, table, version; tickets, rows, moves, records, other plans and their tickets).

        The word that says when a record was last updated stays here: to its new owner it counts as updated now.
        """
        manager, table, store = self._manager, plan.table, plan.table.store
        notes = manager.serving.notes_of(store)
        slots, rows = plan.slots[positions], plan.rows[positions]
        keys, moves = table.keys(rows), notes.moves(slots) + 1
        sole = int(notes.holds(slots).sum()) == len(slots)
        notes.clear(slots)
        others, their_tickets = ([], []) if sole else self._take_from_others(peer, plan, slots)
        records = cuda_ops.gather(
            store.words, store.stride, slots, np.empty((len(slots), _words_of(store)), store.words.dtype)
        )
        store.release(keys)
        told = manager.directory.gave(keys, peer, moves)
        whole = len(positions) == len(plan.slots)
        arrays = (
            ALL_TICKETS if whole else narrow(plan.tickets[positions]),
            narrow(rows),
            narrow(moves),
            records,
            np.array(others, np.int64),
            narrow(np.concatenate([np.empty(0, np.int64), *their_tickets])),
        )
        send = manager.transport.send
        send(peer, Message(Kind.RECORDS, (plan.number, table.number, manager.applied), arrays))
        for home, part in enumerate(told):
            if len(part):
                send(home, Message(Kind.MOVED, (table.number, peer), (narrow(rows[part]), narrow(moves[part]))))
        manager.directory.await_homes(keys, manager.steps)  # read after sending: no STEP of it has left before
        manager.traffic.relocations[table.number] += len(rows)
        if manager.recorder is not None:
            manager.recorder.note("moved away", table.number, rows, round=manager.applied, other=peer)

    def _take_from_others(self, peer: int, plan: AskedPlan, slots: np.ndarray) -> tuple[list[int], list[np.ndarray]]:
        """Remove rows that leave from the other plans of `peer`; return (numbers and counts in turn, tickets)."""
        serving = self._manager.serving
        notes = serving.notes_of(plan.table.store)
        notes.mark(slots)
        numbers, tickets = [], []
        for other in serving.plans_of(peer):
            if other is plan or other.table is not plan.table:
                continue
            leaves = notes.is_marked(other.slots)
            if leaves.any():
                tickets.append(other.tickets[leaves])
                numbers += [other.number, len(tickets[-1])]
                other.keep(~leaves)
        notes.clear(slots)
        return numbers, tickets

    # In

    def on_records(self, source: int, message: Message) -> None:
        """RECORDS: `source` gives up rows; see `_send`."""
        manager = self._manager
        number, table_number, version = message.numbers
        tickets, rows, moves, records, others, their_tickets = message.arrays
        table = manager.tables[table_number]
        rows = widen(rows)
        slots = self._install(table, rows, moves, records, version)
        if manager.recorder is not None:
            manager.recorder.note("moved here", table_number, rows, round=manager.applied, other=source)
        asking = manager.asking
        asking.took_over(number, asking.tickets_of(number, source) if not len(tickets) else widen(tickets), slots)
        start = 0
        for other, count in others.reshape(-1, 2).tolist():
            some = widen(their_tickets[start : start + count])
            asking.took_over(other, some, None)
            start += count
        manager.requests.retry()

    def _install(
        self, table: Table, rows: np.ndarray, moves: np.ndarray, records: np.ndarray, version: int
    ) -> np.ndarray:
        manager, store = self._manager, table.store
        keys = table.keys(rows)
        with manager.structure:
            slots = store.allocate(len(rows))
            store.put(slots, records)
            cuda_ops.mark_steps(store.steps, store.record_class.record_bytes, slots, version)
            store.index.add(keys, slots)
            manager.serving.notes_of(store).set_moves(slots, moves)
            manager.directory.arrived(keys)
        return slots

    def on_moved(self, source: int, message: Message) -> None:
        """MOVED(table, to; rows, moves): `source` has given rows of which this rank is the home to another."""
        manager = self._manager
        table = manager.tables[message.numbers[0]]
        keys = table.keys(widen(message.arrays[0]))
        with manager.structure:
            held = table.store.index.find(keys) >= 0
            manager.directory.moved(keys, message.numbers[1], widen(message.arrays[1]), held)


def _words_of(store: RecordStore) -> int:
    """Return the number of words of a record that travel: all but the step of its last update."""
    return store.stride - 8 // store.words.itemsize
