"""Records as they are, out of a manager and back into one: what a checkpoint is made of.

A record whose table's steps move every row may be behind them; it leaves with the number of the step up to which it is
caught up, so that taking it out changes nothing, and whoever puts it back brings the history of the steps too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

import cuda_ops
from pm.manager import Manager
from pm.tables import Table


@dataclass(frozen=True)
class Records:
    """Some rows of one table.

    Args:
        rows: distinct row ids, int64 `[n]`.
        values: `[n, dim]` in the table's dtype.
        states: optimizer state `[n, state_words]` in the table's dtype.
        caught_up: which steps of the table's history each reflects, as the store says it (int64 `[n]`); None for tables
            without one.
    """

    rows: np.ndarray
    values: np.ndarray
    states: np.ndarray
    caught_up: np.ndarray | None


def owned_in_order(manager: Manager, table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Return (rows int64 `[n]` ascending, their slots int64 `[n]`) of the records of `table` that this rank owns."""
    rows, slots = manager.owned_slots(table)
    bits = int(slots.max(initial=0)).bit_length()
    if bits + int(rows.max(initial=0)).bit_length() < 63:  # sorting numbers is several times faster than argsort
        packed = (rows << bits) | slots
        packed.sort()
        return packed >> bits, packed & ((1 << bits) - 1)
    order = np.argsort(rows)
    return rows[order], slots[order]


def read_records(table: Table, rows: np.ndarray, slots: np.ndarray, chunk_rows: int) -> Iterator[Records]:
    """Yield the records of `rows` at `slots` (int64 `[n]` both) as they are, at most `chunk_rows` at a time.

    With several ranks this is called inside the manager's `still()`. What is yielded is the caller's.
    """
    store, dim = table.store, table.spec.dim
    for start in range(0, len(rows), chunk_rows):
        some = slots[start : start + chunk_rows]
        values = store.values(some, np.empty((len(some), dim), table.spec.dtype))
        caught_up = None if table.history is None else store.caught_up_words(some)
        yield Records(rows[start : start + chunk_rows], values, store.states(some), caught_up)


def write_records(manager: Manager, table: Table, records: Records) -> None:
    """Make records that this rank owns what `records` say (inside `still()`); those that are absent are made."""
    if not len(records.rows):
        return
    slots, store = manager.make_slots(table, records.rows), table.store
    store.set_values(slots, records.values)
    if records.states.shape[1]:
        store.set_states(slots, records.states)
    if table.history is not None:
        store.set_caught_up_words(slots, records.caught_up)
    manager.records_changed(table, slots)


def initial_records(manager: Manager, table: Table, rows: np.ndarray) -> Records:
    """Return what distinct `rows` (int64 `[n]`) are before any step."""
    values, states = manager.initial_rows(table, rows)
    return Records(rows, values, states, caught_up_to(table, 0, len(rows)))


def caught_up_to(table: Table, count: int, records: int) -> np.ndarray | None:
    """Return what so many records say that are caught up to step `count`; None for tables without a history."""
    return None if table.history is None else np.full(records, cuda_ops.caught_up_word(count), np.int64)


def latest_caught_up(words: np.ndarray) -> int:
    """Return the last step that any of records with these words (int64 `[n]`) says it is caught up to; -1 for a word
    that is none."""
    if words.min(initial=0) < 0:
        return -1
    return int(max((words >> 32).max(initial=0), (words & 0xFFFFFFFF).max(initial=0)))
