"""A gradient of a table as a sum of parts: what backward delivered, with scales that are still to be applied.

A table has one for `.grad`; a gradient of one backward, or one that an operation returned, has its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from adaloader.errors import ManagedTableError
from adaloader.gradients.parts import Part, coalesce, no_rows

if TYPE_CHECKING:
    from adaloader.gradients.block_gradient import BlockGradient
    from adaloader.tables.managed_table import ManagedTable


class RowSum:
    """Parts of one table's gradient.

    Invariant: the gradient is the sum over `parts` of scale x values. On several ranks it is the sum over ranks of
    that, until the ranks combine it (`combining.py`); then each rank has some of the rows, whole.

    What a block's backward gave alone is kept as it is (`give_share`) until `parts` are asked for.

    Args:
        table: whose rows they are.
        parts: what there is of it.
        belongs_to_table: whether this is what the next step applies; else it is combined already.
    """

    def __init__(self, table: ManagedTable, parts: list[Part], *, belongs_to_table: bool):
        self.table = table
        self.share: tuple[BlockGradient, int] | None = None
        self._parts = parts
        self.belongs_to_table = belongs_to_table
        self.norms: dict[tuple[float, torch.dtype | None], torch.Tensor] = {}

    @property
    def parts(self) -> list[Part]:
        if self.share is not None:
            (given, place), self.share = self.share, None
            self._parts = [given.part(place)]
            self._parts[0].scale = 1.0
        return self._parts

    @parts.setter
    def parts(self, parts: list[Part]) -> None:
        self.share, self._parts = None, parts

    @property
    def is_empty(self) -> bool:
        """Whether it has no parts."""
        return self.share is None and not self._parts

    def give_share(self, given: BlockGradient, place: int) -> None:
        """Make an empty gradient the share of the table at `place` of a block; the backward that gave it needs no
        factor."""
        self.share = given, place
        self.changed()

    @property
    def is_spread(self) -> bool:
        """Whether other ranks have rows of it too."""
        return self.table.owner.ranks > 1

    def ready(self) -> None:
        """Make this rank's values those that count (on several ranks: collective, where they are not yet)."""
        if self.belongs_to_table and self.is_spread:
            self.table.owner.combiner.combine()

    def whole(self) -> Part:
        """Return all parts in one, which stays the gradient, so that changes to its values count; see `ready`.

        One without parts keeps none: to whom is asked whether there is a gradient, a part without rows is one.
        """
        self.ready()
        if self.is_empty:
            return no_rows(self.table)
        if len(self.parts) != 1:
            self.parts = [sum_of(self.parts, self.table)]
        (only,) = self.parts
        if only.scale not in (None, 1.0):
            if only.values.requires_grad:  # of backward(create_graph=True)
                only.values = only.values * only.scale
            else:
                only.values.mul_(only.scale)
        only.scale = 1.0
        return only

    def changed(self) -> None:
        """The gradient is not what it was: norms that are known of it are not its own."""
        self.norms.clear()

    def scale(self, factor: float) -> None:
        """Multiply it by `factor`."""
        if self.belongs_to_table and self.is_spread and self.table.owner.combiner.others_hold_parts():
            self.ready()
        self.changed()
        for part in self.parts:
            part.scale = (1.0 if part.scale is None else part.scale) * factor

    def mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> RowSum:
        """Return the gradient with `function` applied to the values `[U, dim]`; it must keep zeros."""
        whole = self.whole()
        return RowSum(self.table, [Part(whole.rows, function(whole.values), None, 1.0)], belongs_to_table=False)

    def gather(self, values: np.ndarray) -> list[np.ndarray]:
        """Return what each rank that has rows of it gives (float64 `[n]`), in rank order (collective)."""
        self.ready()
        return self.table.owner.combiner.gather(values) if self.is_spread else [values]

    def copied(self) -> list[Part]:
        """Return parts of the same gradient whose values may be changed without changing this one."""
        whole = self.whole()
        return [Part(whole.rows, whole.values.clone(), None, 1.0)]


def sum_of(parts: list[Part], table: ManagedTable) -> Part:
    """Return the sum of `parts` (without counts) as one, differentiable where one of them is."""
    if not parts:
        return no_rows(table)
    if not any(part.values.requires_grad for part in parts) or not torch.is_grad_enabled():
        return coalesce(parts)
    stacked = torch.cat([part.values * (1.0 if part.scale is None else part.scale) for part in parts])
    rows, inverse = np.unique(np.concatenate([part.rows for part in parts]), return_inverse=True)
    values = stacked.new_zeros(len(rows), stacked.shape[1]).index_add(0, table.here(inverse), stacked)
    return Part(rows, values, None, 1.0)


def refusal(table: ManagedTable, operation: str, remedy: str = "") -> ManagedTableError:
    """Return the error for an operation that row gradients do not have."""
    return ManagedTableError(
        f"{operation} cannot be applied to the row gradient of table {table.name!r}; "
        + (remedy or "use its .rows and .values, or norm, mul_, div_, clamp_, zero_, to_dense")
    )
