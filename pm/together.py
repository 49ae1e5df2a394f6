"""Rows of several tables in one call: what costs as much per table as per thousand rows is done once for all of them.

It is so where a rank has all records of tables at hand, in one store: of a rank that is alone, or in memory that all
ranks change. Else these functions do for each table by itself what they would do together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pm.tables import RowPlan, Table, TableGradient

if TYPE_CHECKING:
    from pm.manager import Manager

Groups = Mapping[int, Mapping[str, object]]
"""Hyperparameters by number of table; tables of one parameter group have the same object."""


@dataclass(frozen=True)
class JointGradient:
    """A step's gradients, without a factor, of all tables whose plans were made together.

    Args:
        tables: in order.
        plans: of each.
        rows: of all tables, one after the other, int64 `[U]`.
        starts: T + 1 places in `rows`, where those of each table begin.
        sums: the gradients `[U, dim]`.
    """

    tables: Sequence[Table]
    plans: Sequence[RowPlan]
    rows: np.ndarray
    starts: Sequence[int]
    sums: np.ndarray

    def split(self) -> list[TableGradient]:
        """Return the gradient of each table by itself."""
        return [self.of_table(place) for place in range(len(self.tables))]

    def of_table(self, place: int) -> TableGradient:
        """Return the gradient of the table at `place` by itself."""
        part = slice(self.starts[place], self.starts[place + 1])
        return TableGradient(
            self.tables[place], self.rows[part], self.sums[part], 1.0, self.plans[place], 0, None, self.sums
        )


def intend_together(
    manager: Manager, tables: Sequence[Table], keys: np.ndarray, rows: np.ndarray, starts: Sequence[int], expected: int
) -> list[RowPlan]:
    """Return a plan for each table, as `Manager.intend` does.

    Args:
        manager: of the tables.
        tables: distinct.
        keys: int64 `[U]`, distinct, of all tables' rows; those of table i are at [starts[i], starts[i + 1]).
        rows: int64 `[U]`, the row ids that they stand for, in range.
        starts: T + 1 of them.
        expected: the version at which they will be looked up, about.
    """
    parts = [rows[first:end] for first, end in zip(starts, starts[1:], strict=False)]
    with manager.structure:
        stretch = manager.find_together(tables, keys, rows, starts)
        if stretch is not None:
            return [
                RowPlan(
                    manager.next_plan_number(),
                    table,
                    part,
                    expected,
                    stretch.slots[first : first + len(part)],
                    stretch.store,
                    stretch=stretch,
                    first=first,
                )
                for table, part, first in zip(tables, parts, starts, strict=False)
            ]
    return [manager.intend(table, part, expected) for table, part in zip(tables, parts, strict=True)]


def read_expanded(manager: Manager, plans: Sequence[RowPlan], positions: np.ndarray, out: np.ndarray) -> bool:
    """Write to out[i] (`[n, dim]`) row positions[i] (int64 `[n]`) of those of plans that were made together; return
    False, having done nothing, if that cannot be done at once.

    Rows that are looked up several times are read from their records as often: it takes less than to copy all twice.
    """
    stretch = plans[0].stretch
    if stretch is None or any(plan.table.store is not stretch.store for plan in plans):
        return False
    manager.read_here(stretch.store, stretch.slots.take(positions), out)
    return True


def read_together(manager: Manager, plans: Sequence[RowPlan], out: np.ndarray) -> None:
    """Write the rows of plans that were made together, one after the other, to `out` `[U, dim]`: see `Manager.read`."""
    first = 0
    for plan in plans:
        manager.read(plan, out[first : first + len(plan.rows)])
        first += len(plan.rows)


def apply_joint(joint: JointGradient, groups: Groups, version: int) -> bool:
    """Update the records of all tables at once; return False, having done nothing, where they are not to be updated
    alike."""
    stretch, first = joint.plans[0].stretch, joint.tables[0]
    if stretch is None:
        return False
    store, count, rule, group = stretch.store, first.gradient_steps, first.spec.rule, groups[first.number]
    for table in joint.tables:
        if (
            table.store is not store
            or table.gradient_steps != count
            or groups[table.number] is not group
            or type(table.spec.rule) is not type(rule)
        ):
            return False
    for table in joint.tables:
        table.gradient_steps += 1
        table.begun = True
    if len(joint.rows):
        store.keep(stretch.slots)
        rule.apply(store, stretch.slots, joint.sums, 1.0, group, count + 1, version)
    return True


def runs(gradients: Sequence[TableGradient], groups: Groups) -> Iterator[list[TableGradient]]:
    """Cut a step's gradients, one per table, into runs that `apply_together` can apply; each as long as can be."""
    run: list[TableGradient] = []
    for gradient in gradients:
        if run and not _continues(run[-1], gradient, groups):
            yield run
            run = []
        run.append(gradient)
    if run:
        yield run


def _continues(last: TableGradient, gradient: TableGradient, groups: Groups) -> bool:
    """Whether records and values of `gradient` follow those of `last` in memory, and are to be updated alike."""
    plan, before, table, other = gradient.plan, last.plan, gradient.table, last.table
    return (
        gradient.sums is not None
        and gradient.sums is last.sums
        and plan.stretch is before.stretch is not None
        and plan.first == before.first + len(before.rows)
        and table.store is other.store is plan.stretch.store
        and gradient.scale == last.scale
        and table.gradient_steps == other.gradient_steps
        and type(table.spec.rule) is type(other.spec.rule)
        and groups[table.number] is groups[other.number]
    )


def apply_together(run: Sequence[TableGradient], group: Mapping[str, object], version: int) -> None:
    """Update the records of a run of more than one gradient."""
    first, last = run[0], run[-1]
    part = slice(first.plan.first, last.plan.first + len(last.rows))
    for gradient in run:
        gradient.table.gradient_steps += 1
        gradient.table.begun = True
    if part.stop > part.start:
        stretch, count = first.plan.stretch, first.table.gradient_steps
        slots, sums = stretch.slots[part], first.sums[part]
        stretch.store.keep(slots)
        first.table.spec.rule.apply(stretch.store, slots, sums, first.scale, group, count, version)
