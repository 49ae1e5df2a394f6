"""In words: how what a lookup used differs from what was intended for its batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from intents import users_line

if TYPE_CHECKING:
    from adaloader.lookups.batches import Batch
    from adaloader.tables.managed_table import ManagedTable

_MOST_SHOWN = 8


def describe_mismatch(table: ManagedTable, batch: Batch | None, ids: np.ndarray) -> str:
    """Return where `ids` (int64 `[n]`) were looked up, for which batch, and what had been intended for that."""
    what = f"{len(ids)} ids were looked up at {users_line()}"
    if batch is None:
        return f"{what}, when no batch was in hand"
    what = f"batch {batch.number}: {what}"
    needed = batch.tables.get(table.table.number)
    if needed is None:
        return f"{what}, and none were intended" + ("" if batch.foreseen else " (its keys were not known yet)")
    absent = ids[~np.isin(ids, needed.rows)]
    sizes = [len(expected) for expected, _ in needed.sites]
    shown = str(sizes) if len(sizes) <= _MOST_SHOWN else f"{len(sizes)}"
    example = f", such as id {absent[0]}" if len(absent) else ""
    return f"{what}, of which {len(absent)} were not intended{example}; intended were lookups of {shown} ids"
