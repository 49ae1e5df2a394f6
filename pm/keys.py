"""Keys: one int64 space for all tables. A key carries its table's number and its row, and no offset of one run."""

from __future__ import annotations

import numpy as np

ROW_BITS = 40
MAX_ROWS = 1 << ROW_BITS
_ROW_MASK = MAX_ROWS - 1


def make_keys(table: int, rows: np.ndarray) -> np.ndarray:
    """Return int64 keys `[n]` of `rows` (int64 `[n]`, each below `MAX_ROWS`) of the table with this number."""
    return rows + (table << ROW_BITS)


def rows_of(keys: np.ndarray) -> np.ndarray:
    """Return the row ids (int64 `[n]`) that `keys` (int64 `[n]`) stand for within their tables."""
    return keys & _ROW_MASK


def table_of(keys: np.ndarray) -> np.ndarray:
    """Return the numbers of the tables that `keys` (int64 `[n]`) belong to."""
    return keys >> ROW_BITS
