"""Records as they are, out of a manager and back into one: what a checkpoint is made of.

A record whose table's steps move every row may be behind them; it leaves with the number of the step up to which it is
caught up, so that taking it out changes nothing, and whoever puts it back brings the history of the steps too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

import cuda_ops
from pm.manager import Manager
from pm.storage.shared_store import OwnKeys
from pm.storage.snapshot import Snapshot
from pm.storage.store import RecordClass, RecordStore
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


@dataclass(frozen=True)
class Kept:
    """A store as it was at one instant: its records, and the index of their keys."""

    snapshot: Snapshot
    index: cuda_ops.KeyIndex | OwnKeys


def keep_records(manager: Manager, tables: Sequence[Table], spare_bytes: int) -> dict[RecordStore, Kept]:
    """Return the stores of `tables` as they are now, for as long as each snapshot has not ended.

    With several ranks this is called inside the manager's `still()`. At most `spare_bytes` are taken for records that
    change before they are read.
    """
    with manager.structure:
        stores = list(dict.fromkeys(table.store for table in tables))
        held = sum(len(store) * store.record_class.record_bytes for store in stores)
        kept = {}
        for store in stores:
            index = store.index.copy()
            share = spare_bytes * len(store) * store.record_class.record_bytes // max(1, held)
            kept[store] = Kept(Snapshot(store, share, store.slots_free_in(index)), index)
        return kept


def in_order(rows: np.ndarray, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return distinct rows (int64 `[n]`) ascending, and their slots (int64 `[n]`) with them."""
    bits = int(slots.max(initial=0)).bit_length()
    if bits + int(rows.max(initial=0)).bit_length() < 63:  # sorting numbers is several times faster than argsort
        packed = (rows << bits) | slots
        packed.sort()
        return packed >> bits, packed & ((1 << bits) - 1)
    order = np.argsort(rows)
    return rows[order], slots[order]


def take_records(
    snapshot: Snapshot, record_class: RecordClass, rows: np.ndarray, slots: np.ndarray, chunk_rows: int
) -> Iterator[Records]:
    """Yield the records of `rows` at `slots` (int64 `[n]` both) as they were, at most `chunk_rows` at a time.

    What is yielded is the caller's.
    """
    dim, words = record_class.dim, record_class.state_words
    for start in range(0, len(rows), chunk_rows):
        taken = snapshot.take(slots[start : start + chunk_rows])
        values, states = np.ascontiguousarray(taken[:, :dim]), np.ascontiguousarray(taken[:, dim : dim + words])
        caught_up = taken.view(np.int64)[:, -2].copy() if record_class.catches_up else None
        yield Records(rows[start : start + chunk_rows], values, states, caught_up)


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
