"""What one backward has given to the rows of a block (see `blocks.py`), before anybody asks for a table's share.

Most often nobody does before the step, which takes the shares of all tables in one call: a part for each of them would
be made in vain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

import pm
from adaloader.slabs import Part, Sums

if TYPE_CHECKING:
    from adaloader.managed_table import ManagedTable


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
        self._whole = torch.from_numpy(array)
        self._sums = Sums(array, self._whole.data_ptr())

    def part(self, place: int) -> Part:
        """Return the share of the table at `place`, which the backward that made it is not over for."""
        share = slice(self._starts[place], self._starts[place + 1])
        return Part(self._rows[share], self._whole[share], self._plans[place], None, sums=self._sums)

    def for_step(self, place: int) -> pm.TableGradient:
        """Return the share of the table at `place` as the manager takes it."""
        first, end = self._starts[place], self._starts[place + 1]
        plan = self._plans[place]
        together = self._array if plan is not None and plan.stretch is not None else None
        table = self._tables[place].table
        return pm.TableGradient(table, self._rows[first:end], self._array[first:end], 1.0, plan, 0, None, together)
