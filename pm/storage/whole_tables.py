"""Rows of whole tables, as their owners set and give them: loading, saving, writing from outside of a step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from pm.keys import rows_of, table_of

if TYPE_CHECKING:
    from pm.tables import Table

_CHUNK_ROWS = 1 << 16


class WholeTables:
    """What a `Manager` does with whole tables; the rest of it has their records."""

    structure: threading.RLock
    touch: Callable[[Table, np.ndarray], np.ndarray]
    catch_up: Callable[..., None]
    initial_states: Callable[[Table, np.ndarray], np.ndarray]
    _mark_changed: Callable[[Table, np.ndarray], None]

    def load_rows(self, table: Table, rows: np.ndarray, values: np.ndarray, states: np.ndarray | None) -> None:
        """Set values and, where given, optimizer state of distinct `rows` of which this rank is the owner.

        With several ranks this is called inside `still()`, as are `load_states` and `held_rows`.
        """
        with self.structure:
            slots = self.touch(table, rows)
            self.catch_up(table, slots)
            table.store.set_values(slots, values)
            if states is not None:
                table.store.set_states(slots, states)
            self.records_changed(table, slots)

    def load_states(self, table: Table, rows: np.ndarray, states: np.ndarray) -> None:
        """Set the optimizer state `[n, state_words]` of distinct `rows` of which this rank is the owner."""
        slots = self.touch(table, rows)
        self.catch_up(table, slots)
        table.store.set_states(slots, states)

    def reset_states(self, table: Table) -> None:
        """Have the optimizer state of all records of `table` that this rank owns begin anew (inside `still()`)."""
        rows, _ = self.owned_slots(table)
        for start in range(0, len(rows), _CHUNK_ROWS):
            part = rows[start : start + _CHUNK_ROWS]
            self.load_states(table, part, self.initial_states(table, part))

    def owned_slots(self, table: Table) -> tuple[np.ndarray, np.ndarray]:
        """Return (rows int64 `[n]`, their slots int64 `[n]`) of the records of `table` that this rank owns."""
        with self.structure:
            keys, slots = table.store.index.items()
        return self.of_table(table, keys, slots)

    def of_table(self, table: Table, keys: np.ndarray, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (rows int64 `[m]`, slots int64 `[m]`) of the entries, int64 `[n]`, of its store's index that are of
        `table`."""
        mine = table_of(keys) == table.number
        return rows_of(keys[mine]), slots[mine]

    def make_slots(self, table: Table, rows: np.ndarray) -> np.ndarray:
        """Return the slots (int64 `[n]`) of distinct `rows` that this rank owns; records that are made say nothing yet.

        With several ranks this is called inside `still()`, and what is in the records is set before it ends.
        """
        keys = table.keys(rows)
        with self.structure:
            slots = table.store.index.find(keys)
            absent = np.flatnonzero(slots < 0)
            if len(absent):
                slots[absent] = table.store.allocate(len(absent))
                table.store.index.add(keys[absent], slots[absent])
        return slots

    def records_changed(self, table: Table, slots: np.ndarray) -> None:
        """The records at `slots` were written from outside: copies of them are stale."""
        self._mark_changed(table, slots)

    def held_rows(self, table: Table) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield (rows, values, states) of the records of `table` that this rank owns, in chunks."""
        rows, slots = self.owned_slots(table)
        for start in range(0, len(rows), _CHUNK_ROWS):
            part = slots[start : start + _CHUNK_ROWS]
            self.catch_up(table, part)
            values = table.store.values(part, np.empty((len(part), table.spec.dim), table.spec.dtype))
            yield rows[start : start + _CHUNK_ROWS], values, table.store.states(part)

    def gather_table(self, table: Table, receive: Callable[[np.ndarray, np.ndarray, np.ndarray], None] | None) -> None:
        """Hand all held rows of `table` to `receive(rows, values, states)` on rank 0, in chunks (collective)."""
        for rows, values, states in self.held_rows(table):
            receive(rows, values, states)

    def rewrite_ended(self) -> None:
        """Rows were set by `load_rows` (collective): what was prepared of them before is stale."""
