"""Intending what a batch needs of several tables in one go: see `blocks.py`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

import numpy as np

import cuda_ops
import pm
from adaloader.lookups.batch_rows import BatchRows
from adaloader.lookups.blocks import Block
from adaloader.tables.managed_table import ManagedTable
from pm.keys import ROW_BITS, rows_of, table_of
from pm.together import intend_together

IdsByTable = Mapping[ManagedTable, list[np.ndarray]]


def blocks_of(by_table: IdsByTable) -> list[list[ManagedTable]]:
    """Return which tables can be looked up together: those of one dim and dtype whose lookups are all of that kind,
    on the CPU."""
    alike: dict[tuple[int, str], list[ManagedTable]] = {}
    for table, ids in by_table.items():
        rule, spec, usages = table.table.spec.rule, table.table.spec, table.usages
        if rule.moves_looked_up_rows or isinstance(rule, pm.Frozen) or table.is_dense or table.memory is not None:
            continue
        if all(usages.get(place) is not None for place in range(len(ids))):
            alike.setdefault((spec.dim, spec.dtype), []).append(table)
    return [sorted(tables, key=lambda table: table.table.number) for tables in alike.values()]


def intend_block(
    manager: pm.Manager,
    tables: list[ManagedTable],
    by_table: IdsByTable,
    expected: int,
    scratch: cuda_ops.DedupScratch,
) -> dict[int, BatchRows] | None:
    """Intend what a batch needs of `tables` (in the order of their numbers); None if an id is out of range.

    Args:
        manager: of the tables.
        tables: of one of `blocks_of`.
        by_table: per lookup, the ids (int64 `[n]`).
        expected: the version at which they will be looked up, about.
        scratch: of this thread.
    """
    lookups = [by_table[table] for table in tables]
    usages = [
        table.usages.get(at) for table, of_table in zip(tables, lookups, strict=True) for at in range(len(of_table))
    ]
    arrays = list(chain.from_iterable(lookups))
    ids = np.concatenate(arrays)  # a copy: the loop may change the batch under a view
    ends = np.cumsum(list(map(len, arrays)))
    keys = np.empty_like(ids)
    numbers = [table.table.number for table in tables]
    table_of_site = [place for place, of_table in enumerate(lookups) for _ in of_table]
    bases = np.array([numbers[place] << ROW_BITS for place in table_of_site])
    bounds = np.array([tables[place].table.spec.rows for place in table_of_site])
    if cuda_ops.keys_of_segments(ids, ends, bases, bounds, keys) >= 0:
        return None
    unique, positions = cuda_ops.dedup(keys, scratch)
    starts = [*np.searchsorted(table_of(unique), numbers).tolist(), len(unique)]
    rows = rows_of(unique)
    plans = intend_together(manager, [table.table for table in tables], unique, rows, starts, expected)
    block = Block(tables, plans, rows, starts, positions, ends, table_of_site, usages)
    limits = ends.tolist()
    sites = [(ids[first:end], positions[first:end]) for first, end in zip([0, *limits], limits, strict=False)]
    found, site = {}, 0
    for number, of_table, plan, first_row in zip(numbers, lookups, plans, starts, strict=False):
        end = site + len(of_table)
        needed = BatchRows(plan.rows, sites[site:end], plan, block=block, first_site=site, first_row=first_row)
        found[number], site = needed, end
    return found
