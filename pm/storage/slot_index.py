"""Where records are, by key: for tables of which many rows are held an array by row, for others a `KeyIndex`.

An array is read at one place per row, a quarter of a cache line or less where an index has a line of its own for each
key; and from a fifth of a table's rows on it is not larger. Tables with random rows among billions have no array. Of
several ranks each holds a part of a table: they may have arrays of tables of few rows, whatever they hold of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import cuda_ops
from pm.keys import ROW_BITS, make_keys, rows_of, table_of

# A table has an array from this share of its rows on: 4 bytes for each of its rows, where an index has some 20 for each
# that is held.
_HELD_FOR_ARRAY = 5
MOST_SLOTS = np.iinfo(np.int32).max
"""How many slots a store may have."""


class SlotIndex:
    """Map from distinct keys of a store to its slots, as `cuda_ops.KeyIndex` is. Not for several threads at once.

    Invariant: a table's keys are all in `_arrays[its number]` (int32 by row, slot + 1, 0 for none), if it has one, else
    all in `_others`. `_held` counts them by number of table; `_addresses` and `_bounds` say where the arrays are.

    Args:
        rows_by_table: by number of table, how many rows it has; more may be added to it.
        array_rows: tables with so many rows together have arrays at once, each of 4 bytes a row.
    """

    def __init__(self, rows_by_table: Sequence[int], array_rows: int = 0):
        self._rows_by_table = rows_by_table
        self._array_rows = array_rows
        self._others = cuda_ops.KeyIndex()
        self._arrays: dict[int, np.ndarray] = {}
        self._held = np.zeros(0, np.int64)
        self._addresses = np.zeros(0, np.int64)
        self._bounds = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return int(self._held.sum())

    @property
    def memory_bytes(self) -> int:
        """Bytes of arrays and index, empty places included."""
        return self._others.memory_bytes + sum(array.nbytes for array in self._arrays.values())

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the slot of each key (int64 `[n]`), -1 where it is absent: int64 `[n]`. Keys may repeat."""
        if not self._arrays:
            return self._others.find(keys)
        slots = np.empty(len(keys), np.int64)
        if cuda_ops.slots_by_row(keys, ROW_BITS, self._addresses, self._bounds, slots):
            elsewhere = np.flatnonzero(slots == cuda_ops.ELSEWHERE)
            slots[elsewhere] = self._others.find(keys[elsewhere])
        return slots

    def add(self, keys: np.ndarray, slots: np.ndarray) -> None:
        """Add `keys` (int64 `[n]`) that are not there, with their `slots` (int64 `[n]`).

        Raises:
            KeyError: a key is there already or is given twice; nothing is added.
            ValueError: a key or slot is negative or too large, or the numbers differ; nothing is added.
        """
        if len(keys) != len(slots):
            raise ValueError(f"{len(keys)} keys given with {len(slots)} slots")
        if not len(keys):
            return
        if keys.min() < 0 or slots.min() < 0 or slots.max() >= MOST_SLOTS:
            raise ValueError(
                f"keys must not be negative, and slots be in [0, {MOST_SLOTS}), got key {keys.min()} and slots from "
                f"{slots.min()} to {slots.max()}"
            )
        tables = table_of(keys)
        counts = np.bincount(tables)
        with_array = [number for number in np.flatnonzero(counts).tolist() if number in self._arrays]
        others = np.ones(len(keys), bool)
        for number in with_array:
            mine = tables == number
            self._check_absent(number, rows_of(keys[mine]))
            others[mine] = False
        self._others.add(keys[others], slots[others])
        for number in with_array:
            mine = tables == number
            self._arrays[number][rows_of(keys[mine])] = slots[mine] + 1
        self._count(counts)
        for number in np.flatnonzero(counts).tolist():
            if number not in self._arrays and self._is_worth_an_array(number):
                self._make_array(number)

    def remove(self, keys: np.ndarray) -> np.ndarray:
        """Remove `keys` (int64 `[n]`) and return their slots, -1 where a key is absent or repeats: int64 `[n]`."""
        slots = np.full(len(keys), -1, np.int64)
        tables = table_of(keys)
        in_array = np.zeros(len(keys), bool)
        for number, array in list(self._arrays.items()):
            mine = np.flatnonzero((tables == number) & (keys >= 0))
            if not len(mine):
                continue
            in_array[mine] = True
            rows, first = np.unique(rows_of(keys[mine]), return_index=True)
            known = rows < len(array)
            rows, mine = rows[known], mine[first[known]]
            slots[mine] = array[rows] - 1
            array[rows] = 0
        slots[~in_array] = self._others.remove(keys[~in_array])
        self._count(-np.bincount(tables[slots >= 0]))
        for number in [number for number in self._arrays if self._held[number] == 0]:
            del self._arrays[number]
            self._addresses[number] = self._bounds[number] = 0
        return slots

    def items(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (keys, slots), int64 `[len]` each, in any order."""
        found = [self._others.items()]
        for number, array in self._arrays.items():
            rows = np.flatnonzero(array)
            found.append((make_keys(number, rows), array[rows].astype(np.int64) - 1))
        return np.concatenate([keys for keys, _ in found]), np.concatenate([slots for _, slots in found])

    def copy(self) -> SlotIndex:
        """Return an index of the same keys and slots."""
        made = SlotIndex(self._rows_by_table, self._array_rows)
        made._others, made._held = self._others.copy(), self._held.copy()
        made._addresses, made._bounds = self._addresses.copy(), self._bounds.copy()
        for number, array in self._arrays.items():
            made._set_array(number, array.copy())
        return made

    # Within

    def _is_worth_an_array(self, number: int) -> bool:
        rows = self._rows_by_table[number]
        in_all = rows + sum(map(len, self._arrays.values()))
        return self._held[number] * _HELD_FOR_ARRAY >= rows or in_all <= self._array_rows

    def _check_absent(self, number: int, rows: np.ndarray) -> None:
        """Raise unless `rows` (int64 `[n]`) are rows of the table that are not there, and distinct."""
        array = self._arrays[number]
        if rows.max() >= len(array):
            raise ValueError(f"row {rows.max()} is not one of the {len(array)} rows of table {number}")
        again = np.flatnonzero(array[rows])
        if not len(again):
            places = np.arange(1, len(rows) + 1, dtype=np.int32)
            array[rows] = places  # of one that repeats the last stays
            again = np.flatnonzero(array[rows] != places)
            array[rows] = 0
        if len(again):
            row = rows[again[0]]
            raise KeyError(f"row {row} of table {number} is in the index already; find it before adding it")

    def _count(self, counts: np.ndarray) -> None:
        """So many keys of each table were added, or, if negative, removed."""
        if len(counts) > len(self._held):
            more = np.zeros(len(counts) - len(self._held), np.int64)
            self._held = np.concatenate([self._held, more])
            self._addresses = np.concatenate([self._addresses, more])
            self._bounds = np.concatenate([self._bounds, more])
        self._held[: len(counts)] += counts

    def _make_array(self, number: int) -> None:
        """Move a table's keys from the index to an array."""
        keys, slots = self._others.items()
        mine = table_of(keys) == number
        array = np.zeros(self._rows_by_table[number], np.int32)
        array[rows_of(keys[mine])] = slots[mine] + 1
        self._others = cuda_ops.KeyIndex(int((~mine).sum()))
        self._others.add(keys[~mine], slots[~mine])
        self._set_array(number, array)

    def _set_array(self, number: int, array: np.ndarray) -> None:
        self._arrays[number] = array
        self._addresses[number], self._bounds[number] = array.ctypes.data, len(array)
