"""What one backward has given to the rows of a block (see `blocks.py`), before anybody asks for a table's share.

Most often nobody does before the step, which takes the shares of all tables in one call: a part for each of them would
be made in vain.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

import pm
from adaloader.gradients.parts import Part, Sums
from pm.together import JointGradient

if TYPE_CHECKING:
    from adaloader.tables.managed_table import ManagedTable


class BlockGradient:
    """The gradients of a block's rows, whole on this rank; nothing changes them but through the parts made of them.

    Args:
        tables: of the block.
        plans: of each table, None where its batch was finished before.
        rows: of all tables, int64 `[U]`.
        starts: T + 1 places in `rows`, where those of each table begin.
        array: the gradients `[U, dim]`.
    """

    def __init__(
        self,
        tables: Sequence[ManagedTable],
        plans: Sequence[pm.RowPlan | None],
        rows: np.ndarray,
        starts: Sequence[int],
        array: np.ndarray,
    ):
        self._tables, self._plans, self._rows, self._starts, self._array = tables, plans, rows, starts, array
        self.tables = len(tables)
        self._whole = torch.from_numpy(array)
        self._sums = Sums(array, self._whole.data_ptr())

    def part(self, place: int) -> Part:
        """Return the share of the table at `place`, which the backward that made it is not over for."""
        share = slice(self._starts[place], self._starts[place + 1])
        return Part(self._rows[share], self._whole[share], self._plans[place], None, sums=self._sums)

    def give(self, places: Iterable[int]) -> list[int]:
        """Give tables at `places` their shares, which need no factor; return the places of those that have other
        gradients, or somebody who is to hear of this one: they are to receive theirs as parts."""
        others = []
        for place in places:
            table = self._tables[place]
            gradient = table.gradient
            is_alone = gradient.is_empty and table.captured is None and not (table.hooks or table.post_hooks)
            if not is_alone or isinstance(table.table.spec.rule, pm.Frozen):
                others.append(place)
                continue
            gradient.give_share(self, place)
            table.has_gradient, table.is_stepped, table.hidden = True, False, False
        return others

    def joint(self) -> JointGradient | None:
        """Return the shares of all tables as the manager takes them at once; None if a batch of theirs was finished
        before."""
        if any(plan is None for plan in self._plans):
            return None
        tables = [table.table for table in self._tables]
        return JointGradient(tables, self._plans, self._rows, self._starts, self._array)

    def for_step(self, place: int) -> pm.TableGradient:
        """Return the share of the table at `place` as the manager takes it by itself."""
        first, end = self._starts[place], self._starts[place + 1]
        plan = self._plans[place]
        together = self._array if plan is not None and plan.stretch is not None else None
        table = self._tables[place].table
        return pm.TableGradient(table, self._rows[first:end], self._array[first:end], 1.0, plan, 0, None, together)


def shares_for_step(
    shares: Iterable[tuple[BlockGradient, int]],
) -> tuple[list[pm.TableGradient], list[JointGradient]]:
    """Return shares, each (block's gradient, place), as the manager takes them: those of whole blocks at once."""
    places_of: dict[BlockGradient, list[int]] = {}
    for given, place in shares:
        places_of.setdefault(given, []).append(place)
    alone, joint = [], []
    for given, places in places_of.items():
        whole = given.joint() if len(places) == given.tables else None
        if whole is None:
            alone += map(given.for_step, places)
        else:
            joint.append(whole)
    return alone, joint
